//! The devices of this process on the bus: the arm with its simulator, and cameras.

use std::sync::Arc;
use std::time::Duration;

use sinew_drivers::peer::{ArmPeer, CameraPeer, StreamFigures};
use sinew_runtime::transport::{Bus, Keys, Subscription};
use sinew_runtime::{ArmDriver, Camera};

use super::assembly::Plan;
use super::operator;
use super::parts::Part;
use super::referee::RefereePeer;
use super::robot::RunError;
use super::status::{PartStatus, StatusPeer};

/// A camera of the robot: its name, and what captures.
pub type NamedCamera = (String, Box<dyn Camera>);

/// The devices of a launch that run in this process, before they are put on the bus.
#[derive(Default)]
pub struct Devices {
    /// The arm.
    pub arm: Option<Box<dyn ArmDriver>>,
    /// The cameras.
    pub cameras: Vec<NamedCamera>,
    /// The simulator, when the arm is simulated: it judges the episodes.
    pub sim: Option<sinew_drivers::sim::SimHandle>,
}

/// Devices on the bus; dropping it holds the arm and ends their threads.
pub(super) struct RunningDevices {
    // In the order of their end: first nobody says any more that they are there.
    _tokens: Vec<Subscription>,
    _status: Option<StatusPeer>,
    arm: Option<Arc<ArmPeer>>,
    _cameras: Vec<CameraPeer>,
    referee: Option<Arc<RefereePeer>>,
}

impl RunningDevices {
    /// Puts `devices` on the bus.
    pub fn start(devices: Devices, plan: &Plan, keys: &Keys, bus: &Bus) -> Result<Self, RunError> {
        let process = std::process::id();
        let mut tokens = Vec::new();
        let referee = devices.sim.map(|sim| RefereePeer::spawn(sim, keys, bus)).transpose()?;
        let referee = referee.map(Arc::new);
        let config = operator::arm(plan);
        let arm = devices.arm.map(|arm| ArmPeer::spawn(arm, config, keys, bus)).transpose()?;
        let arm = arm.map(Arc::new);
        let mut cameras = Vec::new();
        for (name, camera) in devices.cameras {
            cameras.push(CameraPeer::spawn(camera, &name, keys, bus)?);
        }
        let own = |p: &&Part| matches!(p, Part::Arm | Part::Camera(_));
        for part in plan.placement.here.iter().filter(own) {
            tokens.push(bus.announce(&keys.part(&part.to_string(), process))?);
        }
        let (peer, judge) = (arm.clone(), referee.clone());
        let look = move || PartStatus {
            process,
            stream: peer.as_ref().map(|p| p.figures()),
            simulation_skipped_ms: judge.as_ref().map(|r| r.skipped().as_secs_f64() * 1e3),
            ..PartStatus::default()
        };
        let status = match &arm {
            Some(_) => Some(StatusPeer::spawn(bus, keys, &Part::Arm.to_string(), look)?),
            None => None,
        };
        Ok(Self { _tokens: tokens, _status: status, arm, _cameras: cameras, referee })
    }

    /// The command stream as the arm received it; `None` without an arm here.
    pub fn stream(&self) -> Option<StreamFigures> {
        self.arm.as_ref().map(|a| a.figures())
    }

    /// Simulated time that was skipped because the host slept too long; `None` without a simulator here.
    pub fn simulation_skipped(&self) -> Option<Duration> {
        self.referee.as_ref().map(|r| r.skipped())
    }
}
