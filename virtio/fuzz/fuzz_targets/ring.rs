//! Any bytes as rings and descriptors, walked as a worker walks them.
//!
//! A chain that is handed out keeps to the rules, a worker's turn ends, and what fails does so with an error.
#![no_main]

#[allow(dead_code, reason = "shared with the other targets")]
mod input;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use input::Input;
use libfuzzer_sys::fuzz_target;
use virtio::device::{ActiveQueue, Notifier};
use virtio::memory::GuestMap;
use virtio::ring::{
    Chain, MAX_CHAIN, Ring, RingError, fill_front, take_front, take_last_byte, total,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

/// Where the input lies; the rings are in it.
const BASE: u64 = 0x1000;
const RAM: usize = 0x1_0000;

struct Silent;

impl Notifier for Silent {
    fn queue(&self, _queue: u16) {}
    fn config_changed(&self) {}
    fn needs_reset(&self, _reason: &str) {}
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let setup = input.byte();
    let features = u64::from(setup & 1) << 28 | u64::from(setup >> 1 & 1) << 29;
    let size = 1 << (setup >> 2 & 7);
    let mut queue = Queue::new(256).expect("a size");
    queue.set_size(size);
    queue.set_event_idx(features & 1 << 29 != 0);
    let places = [input.byte(), input.byte(), input.byte()].map(|place| u32::from(place) * 16);
    let base = BASE as u32;
    queue.set_desc_table_address(Some(base + places[0]), Some(0));
    queue.set_avail_ring_address(Some(base + places[1]), Some(0));
    queue.set_used_ring_address(Some(base + 0x8000 + places[2]), Some(0));
    queue.set_next_avail(u16::from(input.byte()));
    queue.set_next_used(u16::from(input.byte()));
    queue.set_ready(true);
    let parked = input
        .bytes(usize::from(setup >> 5))
        .iter()
        .map(|head| u16::from(*head));
    let active = ActiveQueue {
        index: 0,
        queue,
        kick: OwnedFd::from(std::fs::File::open("/dev/null").expect("there is one")),
        parked: parked.collect(),
    };
    let view = GuestMap::from_ranges(&[(GuestAddress(BASE), RAM)]).expect("memory");
    let steps = input.bytes(8).to_vec();
    view.write_slice(input.0, GuestAddress(BASE))
        .expect("an input is smaller");
    let mut ring = Ring::new(active, features, Arc::new(Silent));
    for step in steps {
        if let Err(error) = turn(&mut ring, &view, size, step) {
            assert!(!error.to_string().is_empty());
            ring.fail(&error);
            break;
        }
    }
    let stopped = ring.stop([]);
    assert!(stopped.parked.len() <= usize::from(size) + 7);
});

/// One turn of a worker.
fn turn(ring: &mut Ring, view: &GuestMap, size: u16, step: u8) -> Result<(), RingError> {
    let mut chain = Chain::default();
    let mut done = Vec::new();
    ring.quiet(view)?;
    for _ in 0..size {
        if step & 1 == 1 && !ring.pending(view)? {
            break;
        }
        if !ring.take(view, &mut chain)? {
            break;
        }
        let count = chain.readable.len() + chain.writable.len();
        assert!(count <= usize::from(MAX_CHAIN));
        assert!(total(&chain.readable) + total(&chain.writable) <= u64::from(u32::MAX));
        let written = serve(view, &mut chain, step);
        if step & 2 == 2 {
            done.push((chain.head, written));
        } else if step & 4 == 4 {
            ring.put_back([chain.head].into_iter());
            break;
        } else {
            ring.complete(view, chain.head, written)?;
        }
    }
    done.truncate(usize::from(size).saturating_sub(1));
    ring.complete_together(view, &done)?;
    ring.notify(view)?;
    ring.invite(view).map(drop)
}

/// What models do with a chain's extents.
fn serve(view: &GuestMap, chain: &mut Chain, step: u8) -> u32 {
    let mut header = [0; 16];
    let before = total(&chain.readable);
    let took = take_front(view, &mut chain.readable, &mut header);
    let after = total(&chain.readable);
    assert_eq!(before - after, if took { 16 } else { 0 });
    let room = total(&chain.writable);
    if let Some(_status) = take_last_byte(&mut chain.writable) {
        assert_eq!(total(&chain.writable), room - 1);
    }
    let bytes = [step; 600];
    let written = fill_front(view, &chain.writable, &bytes);
    assert!(u64::from(written) <= total(&chain.writable).min(600));
    written
}
