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

mod balls;
mod barrier;
mod path;

use nalgebra::{Point3, Vector3};

use self::barrier::Barrier;
pub use self::barrier::{Plane, SpaceConfig, SpaceError};
use self::path::{PathPoint, watch_path};
use super::brake::BrakePath;
use super::causes::{Cause, Interventions};
use super::joint::{JointFilter, Motion};
use super::quadratic::{MAX_ROWS, Row, project};
use crate::kinematics::{Pose, Sphere};
use crate::{JointVec, MAX_JOINTS};

/// Barriers slow the arm down to nothing this far (m) before the limit, so that the joints' lag has room.
const ROOM: f64 = 1e-3;
/// Share of the joints' deceleration that the approach speed counts on.
const DECELERATION_SHARE: f64 = 0.5;
/// A deceleration (m/s²) that every barrier can count on: what is slow enough for it needs no closer look.
const LEAST_DECELERATION: f64 = 0.5;
/// Barriers that have this much speed (m/s) left do not shape a motion.
const SPARE_SPEED: f64 = 0.3;
/// Rounding of a distance (m).
const ROUNDING: f64 = 1e-9;

/// The space filter of one arm. Real time: nothing here allocates after it is made.
#[derive(Debug, Clone)]
pub(super) struct Space {
    config: SpaceConfig,
    barriers: Vec<Barrier>,
    /// Lowest distance that is allowed: zero, or that of a start which was already nearer.
    floors: Vec<f64>,
    lowered: bool,
    /// Little of the room was left: the arm is being led out before it goes on along the barrier.
    tight: bool,
    /// Levers of every ball about every joint of the chain (m).
    levers: Vec<[f64; MAX_JOINTS]>,
    /// The longest of them for every joint.
    longest: [f64; MAX_JOINTS],
    /// Velocities of the balls' centres (m/s): by the next command, and towards the wish.
    moves: [Vec<Vector3<f64>>; 2],
    /// Barriers that a brake path could reach.
    near: Vec<Barrier>,
    near_floors: Vec<f64>,
    /// At the last command: poses, centres of the balls, distances.
    pose: Pose,
    centres: Vec<Point3<f64>>,
    distances: Vec<f64>,
    /// The poses and centres of a path's point that is looked at.
    probe: (Pose, Vec<Point3<f64>>),
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
        let moves = vec![Vector3::zeros(); config.spheres.len()];
        let levers: Vec<[f64; MAX_JOINTS]> = config.spheres.iter().map(lever).collect();
        let longest = |j: usize| levers.iter().map(|l| l[j]).fold(0.0, f64::max);
        let mut new = Self {
            floors: vec![0.0; barriers.len()],
            distances: vec![0.0; barriers.len()],
            lowered: false,
            tight: false,
            longest: std::array::from_fn(longest),
            levers,
            moves: [moves.clone(), moves],
            near: Vec::with_capacity(barriers.len()),
            near_floors: Vec::with_capacity(barriers.len()),
            pose: Pose::default(),
            probe: (Pose::default(), centres.clone()),
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
        &mut self,
        filters: &[JointFilter],
        wishes: &[Option<(f64, f64)>; MAX_JOINTS],
        next: &[Motion; MAX_JOINTS],
        causes: &mut [Option<Cause>; 2],
    ) -> Option<Option<[f64; MAX_JOINTS]>> {
        let mut velocities = [0.0; MAX_JOINTS];
        let mut nominal = [0.0; MAX_JOINTS];
        for (k, joint) in self.config.chain.joints().iter().enumerate() {
            let Some(filter) = filters.get(joint.index) else { continue };
            let limits = filter.limits();
            velocities[k] = next[joint.index].velocity;
            nominal[k] = wishes[joint.index].map_or(0.0, |(wish, feed)| {
                let gap = wish.clamp(limits.lower, limits.upper) - filter.motion().position;
                (feed + self.config.rate * gap).clamp(-limits.velocity, limits.velocity)
            });
        }
        self.move_balls(0, &velocities);
        self.move_balls(1, &nominal);

        let moves = self.moves.iter().flatten();
        let quickest = 2.0 * moves.map(Vector3::norm_squared).fold(0.0, f64::max).sqrt();
        // Farther away than this no barrier can bind: see `allowed`.
        let horizon =
            (quickest / self.config.rate).max(0.5 * quickest * quickest / LEAST_DECELERATION);
        let mut picked = [(f64::INFINITY, 0); MAX_ROWS];
        let (mut violated, mut least_room) = (false, f64::INFINITY);
        for (number, barrier) in self.barriers.iter().enumerate() {
            let room = self.distances[number] - self.floors[number] - ROOM;
            if room > horizon {
                continue;
            }
            let distance = room.max(0.0);
            let sure = self.allowed(distance, LEAST_DECELERATION);
            let [now, aimed] = self.approach(*barrier);
            if now + sure < 0.0 {
                let deceleration = self.deceleration(&self.gradient(*barrier), filters);
                if now + self.allowed(distance, deceleration) < 0.0 {
                    violated = true;
                    least_room = least_room.min(room);
                    causes[usize::from(barrier.cause() == Cause::SelfCollision)] =
                        Some(barrier.cause());
                }
            }
            let spare = now.min(aimed) + sure;
            // The most pressing ones are kept, in order.
            if spare < SPARE_SPEED && spare < picked[MAX_ROWS - 1].0 {
                let at = picked.partition_point(|p| p.0 <= spare);
                picked[at..].rotate_right(1);
                picked[at] = (spare, number);
            }
        }
        if !violated {
            return None;
        }
        self.tight = least_room < if self.tight { -0.25 * ROOM } else { -0.5 * ROOM };
        let mut rows = [Row { row: [0.0; MAX_JOINTS], bound: 0.0 }; MAX_ROWS];
        let count = picked.iter().take_while(|p| p.0 < SPARE_SPEED).count();
        let mut fastest = [1.0; MAX_JOINTS];
        for (fastest, joint) in fastest.iter_mut().zip(self.config.chain.joints()) {
            *fastest = filters.get(joint.index).map_or(1.0, |f| f.limits().velocity);
        }
        for (row, (_, number)) in rows.iter_mut().zip(&picked[..count]) {
            let room = self.distances[*number] - self.floors[*number] - ROOM;
            row.row = self.gradient(self.barriers[*number]);
            let deceleration = self.deceleration(&row.row, filters);
            // Who slides along a barrier within its room is led out of that: curvature would stop him.
            row.bound =
                -self.allowed(room.max(0.0), deceleration) - self.config.rate * room.min(0.0);
            for (value, fastest) in row.row.iter_mut().zip(&fastest) {
                *value *= fastest;
            }
        }
        let share = |k: usize| if self.tight { 0.0 } else { nominal[k] / fastest[k] };
        let joints = self.config.chain.last_link();
        let found = project(&std::array::from_fn(share), &rows[..count], joints);
        Some(found.map(|found| std::array::from_fn(|k| found[k] * fastest[k])))
    }

    /// The speed (m/s) towards a limit at `distance` that `deceleration` (m/s²) allows.
    fn allowed(&self, distance: f64, deceleration: f64) -> f64 {
        (self.config.rate * distance).min((2.0 * deceleration * distance).sqrt())
    }

    /// What the joints can decelerate along `row` (m/s²).
    fn deceleration(&self, row: &[f64; MAX_JOINTS], filters: &[JointFilter]) -> f64 {
        let joints = self.config.chain.joints().iter().zip(row);
        let along =
            joints.filter_map(|(j, a)| Some(a.abs() * filters.get(j.index)?.limits().acceleration));
        DECELERATION_SHARE * along.sum::<f64>()
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
            travel[k] = (step + low * unit).abs().max((step + high * unit).abs());
            periods = periods.max(path.periods());
            paths[k] = Some((joint.index, path, unit));
        }
        let links = self.config.chain.last_link();
        let total: f64 = self.longest.iter().zip(&travel).map(|(lever, angle)| lever * angle).sum();
        let mut near = std::mem::take(&mut self.near);
        let mut near_floors = std::mem::take(&mut self.near_floors);
        near.clear();
        near_floors.clear();
        let mut sweep = [0.0; MAX_JOINTS];
        for ((barrier, distance), floor) in
            self.barriers.iter().zip(&self.distances).zip(&self.floors)
        {
            // Most are out of reach even of the longest levers.
            if *distance >= total {
                continue;
            }
            for (k, sweep) in sweep.iter_mut().enumerate().take(links) {
                *sweep = self.lever(*barrier, k) * travel[k];
            }
            if *distance < sweep[..links].iter().sum() {
                near.push(*barrier);
                near_floors.push(*floor);
            }
        }
        (self.near, self.near_floors) = (near, near_floors);
        let mut above_zero = true;
        let mut found = None;
        if !self.near.is_empty() {
            let longest = self.longest_by_index();
            let mut look = |period: f64| {
                let mut angles = [0.0; MAX_JOINTS];
                for (index, path, unit) in paths.iter().flatten() {
                    angles[*index] = next[*index].position + path.at(period) * unit;
                }
                let (margin, barrier, positive) = self.margin(&angles);
                above_zero &= positive;
                let point = PathPoint { period, angles, margin };
                if margin < -ROUNDING { Err(barrier) } else { Ok((point, barrier)) }
            };
            found = watch_path(periods, &longest, &mut look).err();
        }
        if found.is_none() && above_zero {
            self.restore_floors();
        }
        found
    }

    /// The longest lever (m) about every one of the arm's joints.
    fn longest_by_index(&self) -> [f64; MAX_JOINTS] {
        let mut levers = [0.0; MAX_JOINTS];
        for (joint, lever) in self.config.chain.joints().iter().zip(&self.longest) {
            levers[joint.index] = *lever;
        }
        levers
    }

    /// The least distance (m) to a floor of the near barriers at `angles`, whose it is, and whether all are above zero.
    fn margin(&mut self, angles: &[f64; MAX_JOINTS]) -> (f64, Barrier, bool) {
        let (pose, centres) = &mut self.probe;
        self.config.chain.forward(angles, pose);
        for (centre, sphere) in centres.iter_mut().zip(&self.config.spheres) {
            *centre = pose.centre(sphere);
        }
        let mut least = (f64::INFINITY, Barrier::Plane { sphere: 0, plane: 0 }, true);
        for (barrier, floor) in self.near.iter().zip(&self.near_floors) {
            let distance = self.config.distance(*barrier, centres);
            least.2 &= distance >= 0.0;
            if distance - floor < least.0 {
                (least.0, least.1) = (distance - floor, *barrier);
            }
        }
        least
    }

    /// The arm has come out of what it began in.
    fn restore_floors(&mut self) {
        if self.lowered {
            self.floors.fill(0.0);
            self.lowered = false;
        }
    }
}
