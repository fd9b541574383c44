//! What the two cameras see: `front` looks down at the table from ahead, `wrist` along the fingers.

use nalgebra::{Isometry3, Point3, Translation3, Vector3};

use super::description::{ArmDescription, ArmGeometry};
use super::raster::{Pinhole, Raster, Rgb};
use super::scene::{BIN_HALF, CUBE_HALF, Scene};
use super::task::Colour;
use super::world::{FINGER_HALF, Snapshot, bin_walls};

/// One of the two cameras.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CameraKind {
    /// Fixed, ahead of the arm and above, looking back and down.
    Front,
    /// On the palm, looking along the fingers.
    Wrist,
}

impl CameraKind {
    /// Both cameras, in the order of their indices.
    pub const ALL: [CameraKind; 2] = [CameraKind::Front, CameraKind::Wrist];

    /// Index in [`CameraKind::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        ["front", "wrist"][self.index()]
    }

    /// The camera of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Vertical field of view (rad).
    fn field_of_view(self) -> f64 {
        [39f64, 84.0][self.index()].to_radians()
    }
}

/// Class of a pixel that shows nothing below.
pub const CLASS_BACKGROUND: u8 = 0;
/// Class of the left bin; the right one follows.
pub const CLASS_BIN: u8 = 5;
/// Class of the arm.
pub const CLASS_ARM: u8 = 7;

/// Class of a cube.
pub fn cube_class(colour: Colour) -> u8 {
    1 + colour.index() as u8
}

const CUBE_RGB: [Rgb; 4] =
    [[235.0, 40.0, 35.0], [30.0, 190.0, 60.0], [40.0, 80.0, 240.0], [250.0, 215.0, 30.0]];
const FLOOR_RGB: Rgb = [196.0, 188.0, 176.0];
const BIN_RGB: Rgb = [112.0, 112.0, 120.0];
const BIN_FLOOR_RGB: Rgb = [74.0, 74.0, 82.0];
const LINK_RGB: Rgb = [250.0, 250.0, 245.0];
const SERVO_RGB: Rgb = [52.0, 55.0, 64.0];
const FINGER_RGB: Rgb = [120.0, 128.0, 140.0];
const PAD_RGB: Rgb = [40.0, 42.0, 48.0];

/// The table's extent (m): x from, x to, y half.
const TABLE: [f64; 3] = [-0.3, 0.55, 0.5];
/// Distance (m) and half width (m) of the table's grid lines.
const GRID: (f64, f64) = (0.05, 0.0009);

/// The camera of `kind` for images of `width × height` pixels.
pub fn camera(
    kind: CameraKind,
    scene: &Scene,
    snapshot: &Snapshot,
    width: usize,
    height: usize,
) -> Pinhole {
    let mount = match kind {
        CameraKind::Front => Pinhole::look_at(
            Point3::new(0.62, 0.0, 0.56),
            Point3::new(0.105, 0.0, 0.01),
            Vector3::z(),
        ),
        CameraKind::Wrist => {
            let eye = Point3::new(-0.062, 0.0, -0.082);
            snapshot.frames.hand
                * Pinhole::look_at(eye, Point3::new(-0.014, 0.0, 0.02), -Vector3::x())
        }
    };
    Pinhole {
        pose: mount * scene.look.camera[kind.index()],
        focal: 0.5 * height as f64 / (0.5 * kind.field_of_view()).tan(),
        centre: [0.5 * width as f64, 0.5 * height as f64],
    }
}

/// A box of the picture.
struct Part {
    pose: Isometry3<f64>,
    half: [f64; 3],
    colour: Rgb,
    class: u8,
}

fn part(frame: &Isometry3<f64>, at: [f64; 3], half: [f64; 3], colour: Rgb, class: u8) -> Part {
    Part { pose: frame * Translation3::from(Vector3::from(at)), half, colour, class }
}

fn arm_parts(g: &ArmGeometry, snapshot: &Snapshot, parts: &mut Vec<Part>) {
    let f = &snapshot.frames;
    let palm = -0.075;
    let finger_y = -g.finger_offset - FINGER_HALF[1];
    let finger_z = 0.001 - FINGER_HALF[2];
    let pad = [FINGER_HALF[0] + 0.0003, 0.0012, 0.011];
    let list = [
        (&f.base, [0.0, 0.0, 0.02], [0.045, 0.045, 0.02], SERVO_RGB),
        (&f.base, [0.0, 0.0, 0.065], [0.03, 0.026, 0.03], LINK_RGB),
        (&f.upper_arm, [0.0, 0.0, 0.0], [0.022, 0.032, 0.022], SERVO_RGB),
        (&f.upper_arm, [0.0, 0.0, g.upper_arm / 2.0], [0.014, 0.02, g.upper_arm / 2.0], LINK_RGB),
        (&f.forearm, [0.0, 0.0, 0.0], [0.019, 0.027, 0.019], SERVO_RGB),
        (&f.forearm, [0.0, 0.0, g.forearm / 2.0], [0.012, 0.016, g.forearm / 2.0], LINK_RGB),
        (&f.wrist, [0.0, 0.0, 0.0], [0.016, 0.022, 0.016], SERVO_RGB),
        (&f.hand, [0.0, 0.0, -0.118], [0.012, 0.012, 0.03], LINK_RGB),
        (&f.hand, [0.0, 0.0, palm], [0.018, 0.045, 0.014], LINK_RGB),
        (&f.hand, [0.0, 0.0, palm + 0.0145], [0.012, 0.043, 0.002], SERVO_RGB),
        (&f.hand, [-0.05, 0.0, -0.094], [0.006, 0.01, 0.006], SERVO_RGB),
        (&f.hand, [-0.032, 0.0, -0.094], [0.016, 0.006, 0.003], SERVO_RGB),
        (&f.hand, [0.0, finger_y, finger_z], FINGER_HALF, FINGER_RGB),
        (&f.hand, [0.0, -g.finger_offset - 0.0011, -0.0099], pad, PAD_RGB),
        (&snapshot.jaw, [0.0, FINGER_HALF[1], finger_z], FINGER_HALF, FINGER_RGB),
        (&snapshot.jaw, [0.0, 0.0011, -0.0099], pad, PAD_RGB),
    ];
    for (frame, at, half, colour) in list {
        parts.push(part(frame, at, half, colour, CLASS_ARM));
    }
}

fn parts(arm: &ArmDescription, scene: &Scene, snapshot: &Snapshot) -> Vec<Part> {
    let mut parts = Vec::with_capacity(32);
    arm_parts(&arm.geometry, snapshot, &mut parts);
    for cube in &snapshot.cubes {
        let colour = CUBE_RGB[cube.colour.index()];
        let class = cube_class(cube.colour);
        parts.push(Part { pose: cube.pose, half: [CUBE_HALF; 3], colour, class });
    }
    for (bin, class) in scene.bins.iter().zip(CLASS_BIN..) {
        for (half, at) in bin_walls() {
            parts.push(part(bin, at, half, BIN_RGB, class));
        }
    }
    parts
}

/// Renders snapshots; keeps its buffers from one image to the next.
#[derive(Debug)]
pub struct Renderer {
    width: usize,
    height: usize,
    raster: Raster,
}

fn rectangle(frame: &Isometry3<f64>, x: [f64; 2], y: [f64; 2]) -> [Point3<f64>; 4] {
    [[x[0], y[0]], [x[1], y[0]], [x[1], y[1]], [x[0], y[1]]]
        .map(|[x, y]| frame * Point3::new(x, y, 0.0))
}

impl Renderer {
    /// A renderer of images of `width × height` pixels.
    pub fn new(width: usize, height: usize) -> Self {
        Self { width, height, raster: Raster::new(width, height) }
    }

    /// Bytes of an image.
    pub fn image_bytes(&self) -> usize {
        self.width * self.height * 3
    }

    /// The camera that [`Self::render`] uses.
    pub fn camera(&self, kind: CameraKind, scene: &Scene, snapshot: &Snapshot) -> Pinhole {
        camera(kind, scene, snapshot, self.width, self.height)
    }

    /// Renders what camera `kind` sees into `out`, `[height, width, 3]`.
    pub fn render(
        &mut self,
        arm: &ArmDescription,
        scene: &Scene,
        snapshot: &Snapshot,
        kind: CameraKind,
        out: &mut [u8],
    ) {
        let look = &scene.look;
        let pinhole = self.camera(kind, scene, snapshot);
        let raster = &mut self.raster;
        raster.start(&pinhole, look.light, look.ambient, look.brightness, FLOOR_RGB);
        let table = look.table.map(|c| c as f32);
        let line = table.map(|c| c * 0.9);
        let (here, [x0, x1, y1]) = (Isometry3::identity(), TABLE);
        raster.flat(&rectangle(&here, [x0, x1], [-y1, y1]), table, CLASS_BACKGROUND);
        let (pitch, half) = GRID;
        for i in 0..=((x1 - x0) / pitch).round() as usize {
            let x = x0 + pitch * i as f64;
            raster.flat(&rectangle(&here, [x - half, x + half], [-y1, y1]), line, CLASS_BACKGROUND);
        }
        for i in 0..=(2.0 * y1 / pitch).round() as usize {
            let y = pitch * i as f64 - y1;
            raster.flat(&rectangle(&here, [x0, x1], [y - half, y + half]), line, CLASS_BACKGROUND);
        }
        for (bin, class) in scene.bins.iter().zip(CLASS_BIN..) {
            let inner = [-BIN_HALF, BIN_HALF];
            raster.flat(&rectangle(bin, inner, inner), BIN_FLOOR_RGB, class);
        }
        let parts = parts(arm, scene, snapshot);
        for part in &parts {
            raster.shadow(&part.pose, part.half);
        }
        for part in &parts {
            raster.solid(&part.pose, part.half, part.colour, part.class);
        }
        raster.resolve(out);
    }

    /// The class of every pixel of the last image, `[height, width]`: 0 background, 1..4 cubes by
    /// colour, 5 and 6 the bins, 7 the arm.
    pub fn labels(&self, out: &mut [u8]) {
        self.raster.labels(out);
    }
}
