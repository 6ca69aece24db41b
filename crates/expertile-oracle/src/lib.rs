//! The slow reference.
