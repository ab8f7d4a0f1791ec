//! The testbed: real guests, on the ground that the machine has.
//!
//! A [`case::Case`] says which guest to boot with which flags and what must come of
//! it. It runs the same way on two grounds:
//!
//! - **direct**: on this machine's own `/dev/kvm`;
//! - **nested**: inside one boot of QEMU ([`nested`]), whose emulated CPU
//!   has AMD's virtualization. The guest there is a stock Debian kernel (L1); its
//!   own KVM runs Vireo, whose guest is called L2.
//!
//! Both use a [`kit`]: one directory with the monitor, kernels, initramfs
//! images and small guests. [`suite`] picks the ground, repeats what the
//! emulator lost, prints one line per case and keeps the books from which CI
//! sees that every class of tests ran somewhere.
//!
//! Everything made here is under `target/testbed`; logs are in its `logs`.

pub mod bench;
pub mod browser;
pub mod case;
pub mod certificates;
pub mod control;
pub mod cpio;
pub mod guests;
pub mod initramfs;
pub mod kernel;
pub mod kit;
pub mod kvm_trace;
pub mod linux;
pub mod look;
pub mod modules;
pub mod nested;
pub mod places;
pub mod probe;
pub mod runner;
pub mod soak;
pub mod suite;
pub mod supply;
pub mod tap;
pub mod viewer;
