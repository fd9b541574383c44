//! Sinew: models.
