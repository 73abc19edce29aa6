//! The database of enrolled volumes and wrapped keys.
