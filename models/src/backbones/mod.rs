//! Networks that turn images and text into features, shared by the families.

pub mod conv;
pub mod florence2;
pub mod multihead;
pub mod resnet;
