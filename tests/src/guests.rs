//! Cases with the small guests.
