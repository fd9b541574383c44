//! Networks that turn images and text into features, shared by the families.

pub mod florence2;
