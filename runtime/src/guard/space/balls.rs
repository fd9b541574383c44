//! How the balls and the distances between them move with the joints.

use nalgebra::Vector3;

use super::Space;
use super::barrier::Barrier;
use crate::MAX_JOINTS;

impl Space {
    /// Velocities of the balls at these of the chain's joints (rad/s).
    pub(super) fn move_balls(&mut self, which: usize, velocities: &[f64; MAX_JOINTS]) {
        let mut links = [(Vector3::zeros(), Vector3::zeros()); MAX_JOINTS + 1];
        for (k, velocity) in velocities.iter().enumerate().take(self.config.chain.last_link()) {
            let (turn, shift) = self.pose.twist(k);
            links[k + 1] = (links[k].0 + turn * *velocity, links[k].1 + shift * *velocity);
        }
        let balls = self.centres.iter().zip(&self.config.spheres);
        for (moves, (centre, sphere)) in self.moves[which].iter_mut().zip(balls) {
            let (turn, shift) = links[sphere.link.min(MAX_JOINTS)];
            *moves = turn.cross(&centre.coords) + shift;
        }
    }

    /// How fast the distance of `barrier` grows (m/s) in both motions of the balls.
    pub(super) fn approach(&self, barrier: Barrier) -> [f64; 2] {
        match barrier {
            Barrier::Plane { sphere, plane } => {
                let normal = &self.config.planes[plane].normal;
                [normal.dot(&self.moves[0][sphere]), normal.dot(&self.moves[1][sphere])]
            }
            Barrier::Pair { a, b } => {
                let apart = self.centres[b] - self.centres[a];
                let per = 1.0 / apart.norm().max(1e-9);
                let along = |m: &Vec<Vector3<f64>>| per * apart.dot(&(m[b] - m[a]));
                [along(&self.moves[0]), along(&self.moves[1])]
            }
        }
    }

    /// The most (m/rad) that the chain's joint `k` can change the barrier's distance.
    pub(super) fn lever(&self, barrier: Barrier, k: usize) -> f64 {
        match barrier {
            Barrier::Plane { sphere, .. } => self.levers[sphere][k],
            // A joint that moves both balls does not move them apart.
            Barrier::Pair { a, .. } if k < self.config.spheres[a].link => 0.0,
            Barrier::Pair { b, .. } => self.levers[b][k],
        }
    }

    /// How the distance of `barrier` changes with each of the chain's joints (m/rad), at the last command.
    pub(super) fn gradient(&self, barrier: Barrier) -> [f64; MAX_JOINTS] {
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
}
