//! Tensors as slices: the kernels work on plain memory.

use std::ops::Deref;

use candle_core::{CpuStorage, Device, Layout, Result, Storage, Tensor, bail};

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

/// The contiguous values of `storage` that `layout` names.
pub(super) fn values_mut<'a>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&mut values[start..end]),
        _ => bail!("an in-place loop needs contiguous f32 values"),
    }
}

/// The contiguous values of `storage` that `layout` names.
pub(super) fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => bail!("an in-place loop needs contiguous f32 values"),
    }
}

/// `values` as a matrix.
pub(super) fn matrix(values: Vec<f32>, rows: usize, width: usize) -> Result<Tensor> {
    Tensor::from_vec(values, (rows, width), &Device::Cpu)
}
