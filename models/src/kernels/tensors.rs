//! Tensors as slices: the kernels work on plain memory.

use std::ops::Deref;

use candle_core::{CpuStorage, Result, Storage, Tensor, bail};

/// The values of a tensor while they are read; `G` is the lock that candle holds on them.
pub(super) struct Values<G> {
    storage: G,
    range: (usize, usize),
}

/// Values of `tensor`, which must be contiguous 32-bit floats.
pub(super) fn read(tensor: &Tensor) -> Result<Values<impl Deref<Target = Storage>>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some(range) = layout.contiguous_offsets() else {
        bail!("a kernel needs contiguous values; shape {:?} is not", tensor.dims())
    };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(_)) => Ok(Values { storage, range }),
        _ => bail!("a kernel needs 32-bit floats in memory, not {:?}", tensor.dtype()),
    }
}

impl<G: Deref<Target = Storage>> Values<G> {
    pub fn get(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.0..self.range.1],
            // `read` admits nothing else.
            _ => &[],
        }
    }
}
