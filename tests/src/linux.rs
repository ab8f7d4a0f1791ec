//! Cases with Linux guests.
