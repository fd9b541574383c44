//! A policy of any action space as one of joint positions.

use super::{ActionSpaceError, JointMap};
use crate::{
    ActionChunk, ChunkRequest, Observation, Policy, PolicyError, PolicySpec, Prefix, Progress,
};

/// Hands every call on to a policy; its actions come out as joint positions, and what it is told is in its own
/// space.
pub struct InJoints {
    policy: Box<dyn Policy>,
    map: JointMap,
    spec: PolicySpec,
    /// Joint positions (rad) in the observation of the inference under way.
    observed: Vec<f64>,
}

impl InJoints {
    /// `policy`, whose actions and states are those of `map`.
    ///
    /// # Errors
    /// [`ActionSpaceError::Width`] when they are not.
    pub fn new(policy: Box<dyn Policy>, map: JointMap) -> Result<Self, ActionSpaceError> {
        let inner = policy.spec();
        for (what, expected, found) in [
            ("actions", map.action_dim(), inner.action_dim),
            ("states", map.state_dim(), inner.state_dim),
        ] {
            if expected != found {
                let space = map.space_name();
                return Err(ActionSpaceError::Width { what, space, expected, found });
            }
        }
        let joints = map.joints().len();
        // The names of joint actions are the policy's own: a wrong order must come to light.
        let names = match map.space().kind.is_pose() {
            true => map.joints().to_vec(),
            false => inner.action_names.clone(),
        };
        let spec = PolicySpec {
            action_dim: joints,
            state_dim: joints,
            action_names: names,
            ..inner.clone()
        };
        Ok(Self { policy, map, spec, observed: Vec::new() })
    }
}

/// What the policy's caller counts; the particulars go to the log.
fn refused(error: ActionSpaceError) -> PolicyError {
    tracing::warn!(%error, "a chunk is refused");
    PolicyError::ActionSpace(error.kind())
}

impl Policy for InJoints {
    fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    fn begin(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
    ) -> Result<(), PolicyError> {
        let expected = self.spec.state_dim;
        let found = observation.proprioception.len();
        if found != expected {
            return Err(PolicyError::StateWidth { expected, found });
        }
        self.observed.clone_from(&observation.proprioception);
        let mut seen = observation.clone();
        seen.proprioception = self.map.state(&self.observed);
        let mut request = request.clone();
        if let Some(prefix) = &mut request.prefix {
            if prefix.dim != self.spec.action_dim {
                let (expected, found) = (self.spec.action_dim, prefix.dim);
                return Err(PolicyError::PrefixWidth { expected, found });
            }
            let actions = self.map.to_actions(&prefix.actions, &self.observed).map_err(refused)?;
            *prefix = Prefix { actions, dim: self.map.action_dim(), ..*prefix };
        }
        self.policy.begin(&seen, &request)
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        self.policy.advance()
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let chunk = self.policy.take_chunk()?;
        let (joints, reach) =
            self.map.to_joints(chunk.values(), &self.observed, chunk.dt).map_err(refused)?;
        let ActionChunk { request, instant, dt, report, .. } = chunk;
        let mut converted = ActionChunk::new(request, instant, dt, self.spec.action_dim, joints)
            .map_err(|e| PolicyError::Compute(e.to_string()))?;
        converted.report = report;
        converted.report.reach = reach;
        Ok(converted)
    }

    fn set_denoise_steps(&mut self, steps: usize) -> Result<bool, PolicyError> {
        self.policy.set_denoise_steps(steps)
    }

    fn forget(&mut self) {
        self.policy.forget();
    }

    fn finish_early(&mut self) -> Result<bool, PolicyError> {
        self.policy.finish_early()
    }
}
