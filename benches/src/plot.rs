//! A scatter plot as SVG text: named points, series of which are joined by lines.

use std::fmt::Write as _;

/// One point.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// What stands beside it.
    pub name: String,
    /// Where it is.
    pub at: [f64; 2],
    /// Where its whisker to the right ends.
    pub up_to: f64,
}

/// A plot.
#[derive(Debug, Clone, PartialEq)]
pub struct Plot {
    /// What stands above it.
    pub title: String,
    /// What the axes are: to the right, and up.
    pub axes: [String; 2],
    /// Points of one colour, joined in this order.
    pub series: Vec<Vec<Point>>,
}

const SIZE: [f64; 2] = [900.0, 560.0];
/// Left, top, right and bottom of the axes.
const FRAME: [f64; 4] = [70.0, 50.0, 720.0, 500.0];
/// Colours that are told apart with every kind of colour vision (Okabe and Ito 2008).
const COLOURS: [&str; 7] =
    ["#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
/// Marks on an axis, about.
const MARKS: f64 = 6.0;

impl Plot {
    /// The plot as an SVG document. Values that are no numbers are left out.
    pub fn svg(&self) -> String {
        let finite = |p: &&Point| p.at.iter().all(|v| v.is_finite());
        let points = || self.series.iter().flatten().filter(finite);
        let most = |values: &mut dyn Iterator<Item = f64>| {
            values.filter(|v| v.is_finite()).fold(0.0, f64::max)
        };
        let ends = [
            most(&mut points().flat_map(|p| [p.at[0], p.up_to])),
            most(&mut points().map(|p| p.at[1])),
        ];
        let steps = ends.map(|end| round_step(end / MARKS));
        let ends = [0, 1].map(|axis| (ends[axis] / steps[axis] + 0.2).ceil() * steps[axis]);
        let [left, top, right, bottom] = FRAME;
        let x = |v: f64| left + v / ends[0] * (right - left);
        let y = |v: f64| bottom - v / ends[1] * (bottom - top);
        let [width, height] = SIZE;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} \
             {height}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" \
             fill=\"white\"/>\n"
        );
        text(&mut out, [left, 28.0], "start", 15, &self.title);
        text(&mut out, [right, bottom + 42.0], "end", 13, &self.axes[0]);
        text(&mut out, [left, top - 8.0], "start", 13, &self.axes[1]);
        for (axis, step) in steps.into_iter().enumerate() {
            let count = (ends[axis] / step).round() as usize;
            for value in (0..=count).map(|k| k as f64 * step) {
                let (from, to, at, anchor) = match axis {
                    0 => ([x(value), top], [x(value), bottom], [x(value), bottom + 18.0], "middle"),
                    _ => ([left, y(value)], [right, y(value)], [left - 8.0, y(value) + 4.0], "end"),
                };
                line(&mut out, from, to, "#dddddd", 1.0);
                text(&mut out, at, anchor, 12, &short(value, step));
            }
        }
        for (series, colour) in self.series.iter().zip(COLOURS.iter().cycle()) {
            let points: Vec<&Point> = series.iter().filter(finite).collect();
            for pair in points.windows(2) {
                let [a, b] = [0, 1].map(|k| [x(pair[k].at[0]), y(pair[k].at[1])]);
                line(&mut out, a, b, colour, 1.5);
            }
            for point in points {
                let [px, py] = [x(point.at[0]), y(point.at[1])];
                if point.up_to.is_finite() && point.up_to > point.at[0] {
                    line(&mut out, [px, py], [x(point.up_to), py], colour, 0.6);
                }
                let _ = writeln!(
                    out,
                    "<circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"4\" fill=\"{colour}\"/>"
                );
                text(&mut out, [px + 7.0, py - 6.0], "start", 11, &point.name);
            }
        }
        out.push_str("</svg>\n");
        out
    }
}

/// A step of 1, 2 or 5 times a power of ten, not below `least`.
fn round_step(least: f64) -> f64 {
    let least = if least.is_finite() && least > 0.0 { least } else { 1.0 };
    let power = 10f64.powf(least.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|f| f * power >= least * (1.0 - 1e-9));
    factor.unwrap_or(10.0) * power
}

/// `value` with as many digits as tell multiples of `step` apart.
fn short(value: f64, step: f64) -> String {
    let digits = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
    format!("{value:.digits$}")
}

fn line(out: &mut String, from: [f64; 2], to: [f64; 2], colour: &str, width: f64) {
    let ([x1, y1], [x2, y2]) = (from, to);
    let _ = writeln!(
        out,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\" \
         stroke-width=\"{width}\"/>"
    );
}

fn text(out: &mut String, [x, y]: [f64; 2], anchor: &str, size: u32, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\">{words}</text>"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(name: &str, x: f64, y: f64) -> Point {
        Point { name: name.to_owned(), at: [x, y], up_to: 2.0 * x }
    }

    #[test]
    fn steps_are_round() {
        for (least, step) in [(0.7, 1.0), (1.0, 1.0), (1.3, 2.0), (0.021, 0.05), (60.0, 100.0)] {
            assert!((round_step(least) / step - 1.0).abs() < 1e-9, "{least}");
        }
        assert_eq!([round_step(0.0), round_step(f64::NAN)], [1.0, 1.0]);
        assert_eq!([short(0.3, 0.1), short(20.0, 5.0)], ["0.3", "20"]);
    }

    #[test]
    fn points_lie_inside_and_names_are_escaped() {
        let series = vec![
            vec![point("a < b & c", 0.0, 1.0), point("far", 3.0, 2.0)],
            vec![point("lost", f64::NAN, 1.0)],
        ];
        let axes = ["error".to_owned(), "speed".to_owned()];
        let svg = Plot { title: "t".to_owned(), axes, series }.svg();
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("a &lt; b &amp; c") && !svg.contains("lost") && !svg.contains("NaN"));
        assert_eq!(svg.matches("<circle").count(), 2);
        for (tag, least, most) in [("x2=\"", FRAME[0], FRAME[2]), ("cy=\"", FRAME[1], FRAME[3])] {
            for found in svg.split(tag).skip(1) {
                let number = found.split('"').next().unwrap_or_default();
                let number: f64 = number.parse().expect("it is a number");
                assert!((least..=most).contains(&number), "{tag}{number}");
            }
        }
        // Without points there are axes, and no division by nothing.
        let empty = Plot { title: String::new(), axes: Default::default(), series: vec![] }.svg();
        assert!(!empty.contains("NaN") && !empty.contains("inf"));
    }
}
