//! Where the arm may be: planes and a workspace box for its balls, and no ball within another.
//!
//! Every distance `h` (m) to a plane or between two balls is a barrier: the arm may come nearer only at a
//! speed `α(h)` that shrinks to nothing with it. When the joint filters' next commands keep all barriers they
//! pass unchanged; else their velocities are moved to the nearest ones that do (weighted by the joints' speed
//! limits) and followed within the joint limits.
//!
//! That alone is first-order and knows no inertia. What holds in the end is the invariant of the joint filters,
//! carried over to space: a command is accepted only when the brake path of all joints together, from there to
//! rest, keeps every `h` at zero or above. Braking always is such a path. So the joint limits
//! are never traded for a barrier, nor a barrier for them.

use nalgebra::{Point3, Unit, Vector3};

use super::brake::BrakePath;
use super::causes::{Cause, Interventions};
use super::joint::{JointFilter, Motion};
use super::quadratic::{MAX_ROWS, Row, project};
use crate::kinematics::{Chain, Pose, Sphere};
use crate::{JointVec, MAX_JOINTS};

/// Barriers slow the arm down to nothing this far (m) before the limit, so that the joints' lag has room.
const ROOM: f64 = 1e-3;
/// Share of the joints' deceleration that the approach speed counts on.
const DECELERATION_SHARE: f64 = 0.5;
/// Points of a long brake path that are looked at; all of a short one.
const SAMPLES: f64 = 10.0;
/// What a ball may come nearer (m) between two points of a long path.
const SAG: f64 = 3e-4;
/// Rounding of a distance (m).
const ROUNDING: f64 = 1e-9;

/// A half-space that the arm stays in: `normal · point >= offset`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Plane {
    /// What it stands for.
    pub name: String,
    /// Its normal, pointing to where the arm may be (base frame).
    pub normal: Unit<Vector3<f64>>,
    /// Its distance from the base's origin along the normal (m).
    pub offset: f64,
}

/// The arm's shape and where it may be.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SpaceConfig {
    /// The arm's joints.
    pub chain: Chain,
    /// Balls that cover the arm, its tool tip among them.
    pub spheres: Vec<Sphere>,
    /// Half-spaces that every moving ball stays in.
    pub planes: Vec<Plane>,
    /// Keep balls of links that are not neighbours apart.
    pub self_collision: bool,
    /// How fast the speed towards a limit falls with the distance (1/s): `h' >= -rate·h`.
    pub rate: f64,
}

/// Why a space cannot be guarded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SpaceError {
    /// A ball on a link that the chain has not.
    #[error("ball `{name}` is on link {link}; the chain's links are 0 to {last}")]
    Link {
        /// The ball.
        name: String,
        /// Its link.
        link: usize,
        /// The chain's last link.
        last: usize,
    },
    /// A number that is not finite or out of range.
    #[error("{what} is {value}; it must be finite and {range}")]
    Value {
        /// What it is.
        what: String,
        /// Its value.
        value: f64,
        /// What is allowed.
        range: &'static str,
    },
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Barrier {
    Plane { sphere: usize, plane: usize },
    Pair { a: usize, b: usize },
}

impl Barrier {
    fn cause(self) -> Cause {
        match self {
            Barrier::Plane { .. } => Cause::Workspace,
            Barrier::Pair { .. } => Cause::SelfCollision,
        }
    }
}

/// The space filter of one arm. Real time: nothing here allocates after it is made.
#[derive(Debug, Clone)]
pub(super) struct Space {
    config: SpaceConfig,
    barriers: Vec<Barrier>,
    /// Lowest distance that is allowed: zero, or that of a start which was already nearer.
    floors: Vec<f64>,
    lowered: bool,
    /// Levers of every ball about every joint of the chain (m).
    levers: Vec<[f64; MAX_JOINTS]>,
    /// At the last command: poses, centres of the balls, distances.
    pose: Pose,
    centres: Vec<Point3<f64>>,
    distances: Vec<f64>,
    /// The same of a path's point that is looked at.
    probe: Probe,
}

#[derive(Debug, Clone)]
struct Probe {
    pose: Pose,
    centres: Vec<Point3<f64>>,
}

impl Space {
    pub fn new(config: SpaceConfig, position: &JointVec) -> Result<Self, SpaceError> {
        let value = |what: String, value, range| Err(SpaceError::Value { what, value, range });
        if !(config.rate > 0.0 && config.rate.is_finite()) {
            return value("the barriers' rate".to_owned(), config.rate, "above zero");
        }
        let last = config.chain.last_link();
        for Sphere { name, link, centre, radius } in &config.spheres {
            if *link > last {
                return Err(SpaceError::Link { name: name.clone(), link: *link, last });
            }
            if !(radius.is_finite() && *radius >= 0.0) {
                return value(format!("the radius of ball `{name}`"), *radius, "not below zero");
            }
            if let Some(bad) = centre.iter().find(|c| !c.is_finite()) {
                return value(format!("the centre of ball `{name}`"), *bad, "a length");
            }
        }
        if let Some(bad) = config.planes.iter().find(|p| !p.offset.is_finite()) {
            return value(format!("the offset of plane `{}`", bad.name), bad.offset, "a length");
        }
        let spheres = || config.spheres.iter().enumerate();
        let mut barriers = Vec::new();
        for (sphere, _) in spheres().filter(|s| s.1.link > 0) {
            barriers.extend((0..config.planes.len()).map(|plane| Barrier::Plane { sphere, plane }));
        }
        for (b, outer) in spheres().filter(|_| config.self_collision) {
            let apart = |s: &(usize, &Sphere)| s.1.link + 1 < outer.link;
            barriers.extend(spheres().filter(apart).map(|(a, _)| Barrier::Pair { a, b }));
        }
        let lever = |s: &Sphere| {
            std::array::from_fn(|j| {
                if j < last { config.chain.lever(j, s.link, &s.centre) } else { 0.0 }
            })
        };
        let centres = vec![Point3::origin(); config.spheres.len()];
        let mut new = Self {
            floors: vec![0.0; barriers.len()],
            distances: vec![0.0; barriers.len()],
            lowered: false,
            levers: config.spheres.iter().map(lever).collect(),
            pose: Pose::default(),
            probe: Probe { pose: Pose::default(), centres: centres.clone() },
            centres,
            barriers,
            config,
        };
        new.rest_at(position);
        Ok(new)
    }

    /// At rest at `position`, wherever that is.
    pub fn rest_at(&mut self, position: &JointVec) {
        self.moved(position);
        for (floor, distance) in self.floors.iter_mut().zip(&self.distances) {
            // Room for the curvature of a way along the barrier, without which there is no way out.
            *floor = if *distance < 0.0 { distance - ROOM } else { 0.0 };
        }
        self.lowered = self.floors.iter().any(|f| *f < 0.0);
    }

    /// The last command is at `position`.
    pub fn moved(&mut self, position: &JointVec) {
        self.config.chain.forward(position.as_slice(), &mut self.pose);
        for (centre, sphere) in self.centres.iter_mut().zip(&self.config.spheres) {
            *centre = self.pose.centre(sphere);
        }
        for (distance, barrier) in self.distances.iter_mut().zip(&self.barriers) {
            *distance = self.config.distance(*barrier, &self.centres);
        }
    }

    /// Makes `next`, which keeps the joint limits, keep the space too, and says what that changed.
    ///
    /// `wishes` are positions and velocities; a joint without one is being braked.
    pub fn shape(
        &mut self,
        filters: &[JointFilter],
        wishes: &[Option<(f64, f64)>; MAX_JOINTS],
        next: &mut [Motion; MAX_JOINTS],
        changed: &mut Interventions,
    ) {
        let wished = *next;
        let mut causes = [None; 2];
        let mut kept = true;
        if let Some(velocities) = self.slowed(filters, wishes, next, &mut causes) {
            match velocities {
                Some(velocities) => self.steer(filters, &velocities, next),
                None => kept = false,
            }
        }
        let nearest = self.unsafe_barrier(filters, next);
        if let Some(barrier) = nearest {
            causes[usize::from(barrier.cause() == Cause::SelfCollision)] = Some(barrier.cause());
        }
        if !kept || nearest.is_some() {
            for joint in self.config.chain.joints() {
                if let Some(filter) = filters.get(joint.index) {
                    next[joint.index] = filter.braked();
                }
            }
        }
        for joint in
            self.config.chain.joints().iter().map(|j| j.index).take_while(|j| *j < filters.len())
        {
            if next[joint] != wished[joint] {
                causes.iter().flatten().for_each(|cause| changed.add(joint, *cause));
            }
        }
    }

    /// Turns `next` towards `velocities` (rad/s, of the chain's joints), all joints by the same share of their change.
    ///
    /// A joint that went as fast as it can by itself would bend the direction, into the barrier.
    fn steer(
        &self,
        filters: &[JointFilter],
        velocities: &[f64; MAX_JOINTS],
        next: &mut [Motion; MAX_JOINTS],
    ) {
        let joints = || {
            let found = self.config.chain.joints().iter().zip(velocities);
            found.filter_map(|(j, v)| Some((j.index, filters.get(j.index)?, *v)))
        };
        let mut share = 1.0f64;
        for (index, filter, velocity) in joints() {
            next[index] = filter.velocity_step(velocity);
            let before = filter.motion().velocity;
            let (reached, wanted) = (next[index].velocity - before, velocity - before);
            if reached * wanted > 0.0 {
                share = share.min(reached / wanted);
            }
        }
        for (index, filter, velocity) in joints() {
            let before = filter.motion().velocity;
            if let Some(motion) = filter.moving_at(before + share * (velocity - before)) {
                next[index] = motion;
            }
        }
    }

    /// Velocities (rad/s, of the chain's joints) that keep the barriers, when those of `next` do not.
    ///
    /// They are the nearest to what closes the gap to the wish at the barriers' rate, so that the arm comes to rest
    /// where it is nearest to the wish. `None`: those of `next` keep them. `Some(None)`: there are none.
    #[allow(clippy::option_option)]
    fn slowed(
        &self,
        filters: &[JointFilter],
        wishes: &[Option<(f64, f64)>; MAX_JOINTS],
        next: &[Motion; MAX_JOINTS],
        causes: &mut [Option<Cause>; 2],
    ) -> Option<Option<[f64; MAX_JOINTS]>> {
        let joints = self.config.chain.joints();
        let mut rows = [Row { row: [0.0; MAX_JOINTS], bound: 0.0 }; MAX_ROWS];
        let mut slacks = [f64::INFINITY; MAX_ROWS];
        let mut count = 0;
        let (mut violated, mut tight) = (false, false);
        // Shares of the joints' speed limits: of the next command, and towards the wish.
        let mut velocities = [0.0; MAX_JOINTS];
        let mut nominal = [0.0; MAX_JOINTS];
        let mut quickest = [0.0; MAX_JOINTS];
        let mut fastest = [0.0; MAX_JOINTS];
        for (k, joint) in joints.iter().enumerate() {
            if let Some(filter) = filters.get(joint.index) {
                let limits = filter.limits();
                fastest[k] = limits.velocity;
                velocities[k] = next[joint.index].velocity / fastest[k];
                nominal[k] = wishes[joint.index].map_or(0.0, |(wish, feed)| {
                    let gap = wish.clamp(limits.lower, limits.upper) - filter.motion().position;
                    ((feed + self.config.rate * gap) / fastest[k]).clamp(-1.0, 1.0)
                });
                quickest[k] = velocities[k].abs().max(nominal[k].abs());
            }
        }
        for (number, barrier) in self.barriers.iter().enumerate() {
            let room = self.distances[number] - self.floors[number] - ROOM;
            let distance = room.max(0.0);
            if distance > self.horizon(*barrier, &quickest, &fastest) {
                continue;
            }
            let mut row = self.gradient(*barrier);
            let mut deceleration = 0.0;
            for (k, joint) in joints.iter().enumerate() {
                let acceleration =
                    filters.get(joint.index).map_or(0.0, |f| f.limits().acceleration);
                deceleration += DECELERATION_SHARE * row[k].abs() * acceleration;
                row[k] *= fastest[k];
            }
            let speed = (self.config.rate * distance).min((2.0 * deceleration * distance).sqrt());
            let mut row = Row { row, bound: -speed };
            let slack = |v: &[f64; MAX_JOINTS]| row.dot(v) - row.bound;
            let (now, aimed) = (slack(&velocities), slack(&nominal));
            let slack = now.min(aimed);
            if now < 0.0 {
                violated = true;
                causes[usize::from(barrier.cause() == Cause::SelfCollision)] =
                    Some(barrier.cause());
            }
            // Who slides along a barrier within its room is led out of that, and first of all
            // when little of it is left: curvature would stop him at once.
            row.bound -= self.config.rate * room.min(0.0);
            tight |= now < 0.0 && room < -0.5 * ROOM;
            // The most pressing ones stay.
            let worst = if count < MAX_ROWS {
                count += 1;
                count - 1
            } else {
                let last = slacks.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
                match last {
                    Some((at, loosest)) if *loosest > slack => at,
                    _ => continue,
                }
            };
            (rows[worst], slacks[worst]) = (row, slack);
        }
        violated.then(|| {
            let nominal = if tight { [0.0; MAX_JOINTS] } else { nominal };
            let found = project(&nominal, &rows[..count])?;
            Some(std::array::from_fn(|k| found[k] * fastest[k]))
        })
    }

    /// Distance (m) beyond which `barrier` cannot bind at these speeds, generously.
    fn horizon(
        &self,
        barrier: Barrier,
        velocities: &[f64; MAX_JOINTS],
        fastest: &[f64; MAX_JOINTS],
    ) -> f64 {
        let mut speed = 0.0;
        for k in 0..self.config.chain.last_link() {
            speed += self.lever(barrier, k) * velocities[k] * fastest[k];
        }
        (2.0 * speed / self.config.rate).max(0.02)
    }

    /// The most (m/rad) that the chain's joint `k` can change the barrier's distance.
    fn lever(&self, barrier: Barrier, k: usize) -> f64 {
        match barrier {
            Barrier::Plane { sphere, .. } => self.levers[sphere][k],
            // A joint that moves both balls does not move them apart.
            Barrier::Pair { a, .. } if k < self.config.spheres[a].link => 0.0,
            Barrier::Pair { b, .. } => self.levers[b][k],
        }
    }

    /// How the distance of `barrier` changes with each of the chain's joints (m/rad), at the last command.
    fn gradient(&self, barrier: Barrier) -> [f64; MAX_JOINTS] {
        let chain = &self.config.chain;
        let (sphere, direction, from) = match barrier {
            Barrier::Plane { sphere, plane } => {
                (sphere, self.config.planes[plane].normal.into_inner(), 0)
            }
            Barrier::Pair { a, b } => {
                let apart = self.centres[b] - self.centres[a];
                let direction = apart.try_normalize(1e-9).unwrap_or_else(Vector3::zeros);
                (b, direction, self.config.spheres[a].link)
            }
        };
        let mut row = [0.0; MAX_JOINTS];
        let link = self.config.spheres[sphere].link;
        for (k, value) in row.iter_mut().enumerate().take(link).skip(from) {
            *value =
                direction.dot(&chain.point_velocity(&self.pose, link, k, &self.centres[sphere]));
        }
        row
    }

    /// A barrier that the brake path of all joints from `next` would break.
    fn unsafe_barrier(
        &mut self,
        filters: &[JointFilter],
        next: &[Motion; MAX_JOINTS],
    ) -> Option<Barrier> {
        let mut paths: [Option<(usize, BrakePath, f64)>; MAX_JOINTS] = [None; MAX_JOINTS];
        let mut travel = [0.0; MAX_JOINTS];
        let mut periods = 0.0f64;
        for (k, joint) in self.config.chain.joints().iter().enumerate() {
            let Some(filter) = filters.get(joint.index) else { continue };
            let motion = &next[joint.index];
            let path = filter.brake_path(motion);
            let (low, high) = path.reach();
            let unit = filter.position_unit();
            let step = motion.position - filter.motion().position;
            travel[k] = (step + low * unit).abs().max((step + high * unit).abs()).max(step.abs());
            periods = periods.max(path.periods());
            paths[k] = Some((joint.index, path, unit));
        }
        let out_of_reach = |this: &Self, number: usize, barrier: Barrier| {
            let moves: f64 = (0..this.config.chain.last_link())
                .map(|k| this.lever(barrier, k) * travel[k])
                .sum();
            this.distances[number] - moves >= 0.0
        };
        let near = |(number, barrier): (usize, &Barrier)| !out_of_reach(self, number, *barrier);
        if !self.barriers.iter().enumerate().any(near) {
            self.restore_floors();
            return None;
        }
        let mut above_zero = true;
        let samples = periods.min(SAMPLES).max(1.0);
        let sag = if periods > SAMPLES { SAG } else { 0.0 };
        let mut angles = JointVec::zeros(MAX_JOINTS);
        for sample in 0..=samples as usize {
            let period = (periods * sample as f64 / samples).round();
            for (index, path, unit) in paths.iter().flatten() {
                angles[*index] = next[*index].position + path.at(period) * unit;
            }
            let Probe { pose, centres } = &mut self.probe;
            self.config.chain.forward(angles.as_slice(), pose);
            for (centre, sphere) in centres.iter_mut().zip(&self.config.spheres) {
                *centre = pose.centre(sphere);
            }
            for (barrier, floor) in self.barriers.iter().zip(&self.floors) {
                let distance = self.config.distance(*barrier, centres);
                if distance < floor + sag - ROUNDING {
                    return Some(*barrier);
                }
                above_zero &= distance >= 0.0;
            }
        }
        if above_zero {
            self.restore_floors();
        }
        None
    }

    /// The arm has come out of what it began in.
    fn restore_floors(&mut self) {
        if self.lowered {
            self.floors.fill(0.0);
            self.lowered = false;
        }
    }
}

impl SpaceConfig {
    /// A good rate (1/s) for small arms: from 10 cm away at 1 m/s, from 1 cm at 10 cm/s.
    pub const RATE: f64 = 10.0;

    fn distance(&self, barrier: Barrier, centres: &[Point3<f64>]) -> f64 {
        match barrier {
            Barrier::Plane { sphere, plane } => {
                let Plane { normal, offset, .. } = &self.planes[plane];
                normal.dot(&centres[sphere].coords) - offset - self.spheres[sphere].radius
            }
            Barrier::Pair { a, b } => {
                let apart = (centres[b] - centres[a]).norm();
                apart - self.spheres[a].radius - self.spheres[b].radius
            }
        }
    }
}
