//! Sinew: calibration.
