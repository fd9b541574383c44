//! What a flow-matching network has to offer.

use std::sync::Arc;

use candle_core::Result;
use sinew_runtime::{Observation, PolicyError};

use super::{Convention, FlowTime};
use crate::caches::{Branches, KeptPrefix, KeptTower};
use crate::kernels::{Matrix, Planes};

/// A network with its processors, stage by stage.
pub trait FlowModel: Send {
    /// Direction of its flow time.
    type Time: Convention + Send;
    /// What it is called with.
    type Inputs: Send;
    /// What its velocities read; made once per chunk.
    type Cache: Send;

    /// Shape of the sample that is denoised, `(H, M)`.
    fn sample_shape(&self) -> (usize, usize);

    /// The inputs of `observation`.
    ///
    /// # Errors
    /// [`PolicyError`] when the observation does not fit.
    fn prepare(
        &mut self,
        observation: &Observation,
    ) -> std::result::Result<Self::Inputs, PolicyError>;

    /// Images of `inputs`, in the model's order.
    fn images(inputs: &Self::Inputs) -> &[Planes];

    /// Tokens of one image.
    ///
    /// # Errors
    /// When its size does not fit.
    fn encode_image(&self, pixels: &Planes) -> Result<Matrix>;

    /// As [`Self::encode_image`], with what `kept` says computed; a model that cannot computes all.
    ///
    /// # Errors
    /// As there.
    fn encode_image_kept(&self, pixels: &Planes, _kept: &mut KeptTower) -> Result<Matrix> {
        self.encode_image(pixels)
    }

    /// As [`Self::encode_prefix`], with what `kept` says computed; a model that cannot computes all.
    ///
    /// # Errors
    /// As there.
    fn encode_prefix_kept(
        &self,
        inputs: &Self::Inputs,
        images: &[Arc<Matrix>],
        _kept: &mut KeptPrefix,
    ) -> Result<Self::Cache> {
        self.encode_prefix(inputs, images)
    }

    /// Whether [`Self::encode_prefix`] gives the same for `a` and `b` when the images' tokens are the same.
    fn same_prefix(a: &Self::Inputs, b: &Self::Inputs) -> bool;

    /// The part of `inputs` that does not depend on the sample, with the `images`' tokens.
    ///
    /// # Errors
    /// When a token is not in the table.
    fn encode_prefix(&self, inputs: &Self::Inputs, images: &[Arc<Matrix>]) -> Result<Self::Cache>;

    /// Layers of the network, when it can be truncated to fewer of them; 0: it cannot.
    fn depth(&self) -> usize {
        0
    }

    /// As [`Self::encode_prefix`], for velocities of the network truncated to its first `depth` layers. What `cache` has of
    /// this prefix already is kept, whatever depth it was made for.
    ///
    /// # Errors
    /// As there.
    fn encode_prefix_to(
        &self,
        inputs: &Self::Inputs,
        images: &[Arc<Matrix>],
        cache: Option<Self::Cache>,
        _depth: usize,
    ) -> Result<Self::Cache> {
        cache.map_or_else(|| self.encode_prefix(inputs, images), Ok)
    }

    /// Velocity of the sample `x` (`[H, M]`) at `times`: one for all actions, or one for each. Its residual branches are
    /// computed, or not, by `branches`.
    ///
    /// # Errors
    /// When shapes do not fit.
    fn velocity(
        &self,
        cache: &Self::Cache,
        x: &Matrix,
        times: &[FlowTime<Self::Time>],
        branches: &mut Branches,
    ) -> Result<Matrix>;

    /// Planned actions (rows of `D`, physical units) as the network has them: rows of `width`.
    ///
    /// # Errors
    /// [`PolicyError::NotFinite`] for a value that is none.
    fn model_actions(
        &self,
        inputs: &Self::Inputs,
        actions: &[f64],
        width: usize,
    ) -> std::result::Result<Vec<f32>, PolicyError>;

    /// A finished sample (`[H, M]`) as actions `[H, D]`, row by row, in physical units.
    ///
    /// # Errors
    /// [`PolicyError::NotFinite`] when a value is no number.
    fn actions(
        &self,
        inputs: &Self::Inputs,
        sample: &Matrix,
    ) -> std::result::Result<Vec<f64>, PolicyError>;
}
