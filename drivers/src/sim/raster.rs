//! A small rasterizer: convex polygons and boxes, depth buffer, flat shading, 2 x 2 samples a pixel.
//!
//! Camera axes: x right, y down, z forward; pixel centres at half integers. Depth is kept as 1/z,
//! which is affine over the image for a plane, so a polygon's depth is exact.

use nalgebra::{Isometry3, Matrix3, Point3, Rotation3, UnitQuaternion, Vector3};

/// Samples along each side of a pixel.
const SAMPLES: usize = 2;
/// Nearer than this (m) nothing is drawn.
const NEAR: f32 = 0.008;
/// Marks a sample that lies in shadow, in the class byte.
const SHADOW: u32 = 0x80;

/// An RGB colour, 0 to 255 a channel.
pub type Rgb = [f32; 3];

/// A pinhole camera.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pinhole {
    /// Its pose (base frame): x right, y down, z forward.
    pub pose: Isometry3<f64>,
    /// Focal length (pixels).
    pub focal: f64,
    /// Principal point (pixels).
    pub centre: [f64; 2],
}

impl Pinhole {
    /// The pose of a camera at `eye` that looks at `target`, its image's top towards `up`.
    pub fn look_at(eye: Point3<f64>, target: Point3<f64>, up: Vector3<f64>) -> Isometry3<f64> {
        let forward = (target - eye).normalize();
        let right = forward.cross(&up).normalize();
        let down = forward.cross(&right);
        let axes = Rotation3::from_matrix_unchecked(Matrix3::from_columns(&[right, down, forward]));
        Isometry3::from_parts(eye.into(), UnitQuaternion::from_rotation_matrix(&axes))
    }

    /// Pixel (u right, v down) and depth (m) of a point; `None` behind the camera.
    pub fn project(&self, point: &Point3<f64>) -> Option<[f64; 3]> {
        let p = self.pose.inverse_transform_point(point);
        (p.z > f64::from(NEAR)).then(|| {
            let scale = self.focal / p.z;
            [self.centre[0] + scale * p.x, self.centre[1] + scale * p.y, p.z]
        })
    }
}

/// What a polygon does to the samples that it covers.
#[derive(Debug, Clone, Copy)]
enum Paint {
    /// Draws over everything without depth: table, floors.
    Flat(u32),
    /// Draws where it is nearest.
    Solid(u32),
    /// Darkens what is flat and not yet in shadow.
    Shadow,
}

/// The sample buffers of one image.
#[derive(Debug)]
pub struct Raster {
    width: usize,
    height: usize,
    depth: Vec<f32>,
    /// Class in the top byte, then red, green, blue.
    colour: Vec<u32>,
    rotation: Matrix3<f32>,
    eye: Vector3<f32>,
    focal: f32,
    centre: [f32; 2],
    light: Vector3<f32>,
    ambient: f32,
    brightness: f32,
}

fn pack(class: u8, colour: Rgb, brightness: f32) -> u32 {
    let channel = |value: f32| (value * brightness).clamp(0.0, 255.0) as u32;
    u32::from(class) << 24 | channel(colour[0]) << 16 | channel(colour[1]) << 8 | channel(colour[2])
}

impl Raster {
    /// Buffers for images of `width × height` pixels.
    pub fn new(width: usize, height: usize) -> Self {
        let (width, height) = (width * SAMPLES, height * SAMPLES);
        Self {
            width,
            height,
            depth: vec![0.0; width * height],
            colour: vec![0; width * height],
            rotation: Matrix3::identity(),
            eye: Vector3::zeros(),
            focal: 1.0,
            centre: [0.0; 2],
            light: Vector3::z(),
            ambient: 0.5,
            brightness: 1.0,
        }
    }

    /// Starts an image: camera, light direction, ambient share, brightness, background.
    pub fn start(
        &mut self,
        camera: &Pinhole,
        light: Vector3<f64>,
        ambient: f64,
        brightness: f64,
        background: Rgb,
    ) {
        self.depth.fill(0.0);
        self.rotation = camera.pose.rotation.inverse().to_rotation_matrix().matrix().cast();
        self.eye = camera.pose.translation.vector.cast();
        self.focal = (camera.focal * SAMPLES as f64) as f32;
        self.centre = camera.centre.map(|c| (c * SAMPLES as f64) as f32);
        self.light = light.cast();
        self.ambient = ambient as f32;
        self.brightness = brightness as f32;
        self.colour.fill(pack(0, background, self.brightness));
    }

    fn to_camera(&self, point: &Vector3<f32>) -> Vector3<f32> {
        self.rotation * (point - self.eye)
    }

    /// Fills a convex polygon given in camera coordinates.
    fn fill(&mut self, corners: &[Vector3<f32>], paint: Paint) {
        let mut clipped = [Vector3::zeros(); 8];
        let mut count = 0;
        for (i, a) in corners.iter().enumerate() {
            let b = &corners[(i + 1) % corners.len()];
            if a.z >= NEAR {
                clipped[count] = *a;
                count += 1;
            }
            if (a.z >= NEAR) != (b.z >= NEAR) {
                clipped[count] = a + (b - a) * ((NEAR - a.z) / (b.z - a.z));
                count += 1;
            }
        }
        if count < 3 {
            return;
        }
        // The plane n·p = d gives 1/z = n·ray / d at every sample.
        let normal = (corners[1] - corners[0]).cross(&(corners[2] - corners[0]));
        let d = normal.dot(&corners[0]);
        if d.abs() < 1e-12 {
            return;
        }
        let normal = normal / d;
        let (per_x, per_y) = (normal.x / self.focal, normal.y / self.focal);
        let constant = normal.z - per_x * self.centre[0] - per_y * self.centre[1];

        let mut screen = [[0f32; 2]; 8];
        let (mut top, mut bottom) = (f32::INFINITY, f32::NEG_INFINITY);
        for (at, p) in screen.iter_mut().zip(&clipped[..count]) {
            let scale = self.focal / p.z;
            *at = [self.centre[0] + scale * p.x, self.centre[1] + scale * p.y];
            top = top.min(at[1]);
            bottom = bottom.max(at[1]);
        }
        let screen = &screen[..count];
        // Samples sit at half integers; a row is covered when its centre is.
        let first = (top - 0.5).ceil().max(0.0) as usize;
        let last = ((bottom - 0.5).ceil().max(0.0) as usize).min(self.height);
        for row in first..last {
            let y = row as f32 + 0.5;
            let (mut left, mut right) = (f32::INFINITY, f32::NEG_INFINITY);
            for (i, a) in screen.iter().enumerate() {
                let b = &screen[(i + 1) % count];
                if (a[1] <= y) != (b[1] <= y) {
                    let x = a[0] + (b[0] - a[0]) * ((y - a[1]) / (b[1] - a[1]));
                    left = left.min(x);
                    right = right.max(x);
                }
            }
            let from = (left - 0.5).ceil().max(0.0) as usize;
            let to = ((right - 0.5).ceil().max(0.0) as usize).min(self.width);
            if from >= to {
                continue;
            }
            let span = row * self.width + from..row * self.width + to;
            let base = constant + per_y * y + per_x * 0.5;
            self.fill_span(span, from, base, per_x, paint);
        }
    }

    fn fill_span(
        &mut self,
        span: std::ops::Range<usize>,
        from: usize,
        base: f32,
        per_x: f32,
        paint: Paint,
    ) {
        let colours = &mut self.colour[span.clone()];
        let depths = &mut self.depth[span];
        match paint {
            Paint::Flat(colour) => colours.fill(colour),
            Paint::Solid(new) => {
                for (i, (colour, depth)) in colours.iter_mut().zip(depths).enumerate() {
                    let nearness = base + per_x * (from + i) as f32;
                    if nearness > *depth {
                        *depth = nearness;
                        *colour = new;
                    }
                }
            }
            Paint::Shadow => {
                for colour in colours {
                    if *colour >> 24 & SHADOW == 0 {
                        // Three quarters of each channel, all at once.
                        let dark = (*colour >> 1 & 0x007f_7f7f) + (*colour >> 2 & 0x003f_3f3f);
                        *colour = (*colour & 0xff00_0000) | SHADOW << 24 | dark;
                    }
                }
            }
        }
    }

    /// Paints a convex polygon (base frame) under everything that is drawn later.
    pub fn flat(&mut self, corners: &[Point3<f64>; 4], colour: Rgb, class: u8) {
        let lit = self.ambient + (1.0 - self.ambient) * self.light.z.max(0.0);
        let colour = pack(class, colour, lit * self.brightness);
        let corners = corners.map(|c| self.to_camera(&c.coords.cast()));
        self.fill(&corners, Paint::Flat(colour));
    }

    /// The eight corners (base frame) of a box at `pose`.
    fn box_corners(pose: &Isometry3<f64>, half: [f64; 3]) -> [Vector3<f32>; 8] {
        let rotation = pose.rotation.to_rotation_matrix();
        let centre = pose.translation.vector;
        let axes = [0, 1, 2].map(|axis| rotation.matrix().column(axis) * half[axis]);
        let sign = |corner: usize, axis: usize| if corner >> axis & 1 == 1 { 1.0 } else { -1.0 };
        std::array::from_fn(|corner| {
            let offset = axes[0] * sign(corner, 0) + axes[1] * sign(corner, 1);
            (centre + offset + axes[2] * sign(corner, 2)).cast()
        })
    }

    /// Faces of a box: corners in order around, and the outward axis with its sign.
    const FACES: [([usize; 4], usize, f32); 6] = [
        ([1, 3, 7, 5], 0, 1.0),
        ([0, 4, 6, 2], 0, -1.0),
        ([2, 6, 7, 3], 1, 1.0),
        ([0, 1, 5, 4], 1, -1.0),
        ([4, 5, 7, 6], 2, 1.0),
        ([0, 2, 3, 1], 2, -1.0),
    ];

    /// Casts the shadow of a box onto the table.
    pub fn shadow(&mut self, pose: &Isometry3<f64>, half: [f64; 3]) {
        let axes: Matrix3<f32> = pose.rotation.to_rotation_matrix().matrix().cast();
        let corners = Self::box_corners(pose, half).map(|c| {
            let on_table = c - self.light * (c.z.max(0.0) / self.light.z.max(0.2));
            self.to_camera(&Vector3::new(on_table.x, on_table.y, 0.0))
        });
        for (face, axis, sign) in Self::FACES {
            if sign * axes.column(axis).dot(&self.light) > 0.0 {
                self.fill(&face.map(|i| corners[i]), Paint::Shadow);
            }
        }
    }

    /// Draws a box.
    pub fn solid(&mut self, pose: &Isometry3<f64>, half: [f64; 3], colour: Rgb, class: u8) {
        let axes: Matrix3<f32> = pose.rotation.to_rotation_matrix().matrix().cast();
        let world = Self::box_corners(pose, half);
        let corners = world.map(|c| self.to_camera(&c));
        for (face, axis, sign) in Self::FACES {
            let normal = axes.column(axis) * sign;
            if normal.dot(&(world[face[0]] - self.eye)) >= 0.0 {
                continue; // turned away
            }
            let lit = self.ambient + (1.0 - self.ambient) * normal.dot(&self.light).max(0.0);
            let packed = pack(class, colour, lit * self.brightness);
            self.fill(&face.map(|i| corners[i]), Paint::Solid(packed));
        }
    }

    /// Writes the image, `[height, width, 3]`; `out` beyond it stays as it is.
    pub fn resolve(&self, out: &mut [u8]) {
        let pixels = out.chunks_exact_mut(3 * self.width / SAMPLES);
        for (rows, line) in self.colour.chunks_exact(SAMPLES * self.width).zip(pixels) {
            let (upper, lower) = rows.split_at(self.width);
            let pairs = upper.chunks_exact(SAMPLES).zip(lower.chunks_exact(SAMPLES));
            for ((a, b), pixel) in pairs.zip(line.chunks_exact_mut(3)) {
                for (channel, value) in pixel.iter_mut().enumerate() {
                    let shift = 16 - 8 * channel as u32;
                    let sum = (a[0] >> shift & 255)
                        + (a[1] >> shift & 255)
                        + (b[0] >> shift & 255)
                        + (b[1] >> shift & 255);
                    *value = ((sum + 2) / 4) as u8;
                }
            }
        }
    }

    /// Writes the class of each pixel's first sample, `[height, width]`.
    pub fn labels(&self, out: &mut [u8]) {
        let lines = out.chunks_exact_mut(self.width / SAMPLES);
        for (row, line) in self.colour.chunks_exact(SAMPLES * self.width).zip(lines) {
            for (sample, class) in row.iter().step_by(SAMPLES).zip(line) {
                *class = (*sample >> 24 & !SHADOW) as u8;
            }
        }
    }
}
