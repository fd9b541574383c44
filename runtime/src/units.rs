//! Quantities as people write them: `"50 Hz"`, `"20 ms"`, `"90 deg"`.

use std::time::Duration;

/// A quantity that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {expected}; write it like `{example}`")]
pub struct UnitError {
    text: String,
    expected: &'static str,
    example: &'static str,
}

fn parse(
    text: &str,
    units: &[(&str, f64)],
    expected: &'static str,
    example: &'static str,
) -> Result<f64, UnitError> {
    let fail = || UnitError { text: text.to_owned(), expected, example };
    let trimmed = text.trim();
    let split =
        trimmed.find(|c: char| !(c.is_ascii_digit() || "+-.".contains(c))).ok_or_else(fail)?;
    let (number, unit) = trimmed.split_at(split);
    let number: f64 = number.trim().parse().map_err(|_| fail())?;
    let unit = unit.trim();
    let factor = units.iter().find(|(name, _)| *name == unit).map(|(_, f)| *f).ok_or_else(fail)?;
    let value = number * factor;
    if value.is_finite() { Ok(value) } else { Err(fail()) }
}

/// A frequency (Hz) from text such as `"100 Hz"` or `"1 kHz"`; greater than zero.
///
/// # Errors
/// [`UnitError`] with the text and an example.
pub fn parse_frequency(text: &str) -> Result<f64, UnitError> {
    let (expected, example) = ("a frequency above zero", "100 Hz");
    let value = parse(text, &[("Hz", 1.0), ("kHz", 1000.0)], expected, example)?;
    if value > 0.0 {
        Ok(value)
    } else {
        Err(UnitError { text: text.to_owned(), expected, example })
    }
}

/// A duration from text such as `"20 ms"`, `"1.5 s"`, `"250 us"`.
///
/// # Errors
/// [`UnitError`] with the text and an example.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let units = [("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("min", 60.0)];
    let (expected, example) = ("a duration", "20 ms");
    let value = parse(text, &units, expected, example)?;
    Duration::try_from_secs_f64(value).map_err(|_| UnitError {
        text: text.to_owned(),
        expected,
        example,
    })
}

/// An angle (rad) from text such as `"90 deg"` or `"1.57 rad"`; also `"deg/s"`, `"deg/s2"`, `"deg/s3"`.
///
/// # Errors
/// [`UnitError`] with the text and an example.
pub fn parse_angle(text: &str) -> Result<f64, UnitError> {
    let deg = std::f64::consts::PI / 180.0;
    let units = [
        ("deg", deg),
        ("rad", 1.0),
        ("deg/s", deg),
        ("rad/s", 1.0),
        ("deg/s2", deg),
        ("rad/s2", 1.0),
        ("deg/s3", deg),
        ("rad/s3", 1.0),
    ];
    parse(text, &units, "an angle (or a rate of one)", "90 deg")
}

/// A length (m), of either sign, from text such as `"20 mm"`, `"-0.4 m"`.
///
/// # Errors
/// [`UnitError`] with the text and an example.
pub fn parse_length(text: &str) -> Result<f64, UnitError> {
    parse(text, &[("m", 1.0), ("cm", 1e-2), ("mm", 1e-3)], "a length", "20 mm")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_units_and_refuses_their_absence() {
        assert_eq!(parse_frequency("1 kHz"), Ok(1000.0));
        assert_eq!(parse_duration("20 ms"), Ok(Duration::from_millis(20)));
        assert!((parse_angle("180 deg").unwrap_or(0.0) - std::f64::consts::PI).abs() < 1e-12);
        assert_eq!(parse_length("-25 mm"), Ok(-0.025));
        assert!(parse_length("0.4").is_err());
        for bad in ["100", "Hz", "-5 Hz", "0 Hz", "1e9999 Hz", "10 m", ""] {
            assert!(parse_frequency(bad).is_err(), "{bad}");
        }
        assert!(parse_duration("-1 s").is_err());
    }
}
