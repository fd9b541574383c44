//! Whole-system tests: what needs several crates at once. One folder per question.
