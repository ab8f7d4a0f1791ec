//! Any bytes as a qcow2 image: opened, read, written, changed in all ways, flushed and closed.
//!
//! The last 32 bytes of the input say what is done; the rest is the image.
#![no_main]

mod memory;

use std::path::Path;

use block::{Image, NewSnapshot, Preallocation, open_image};
use libfuzzer_sys::{Corpus, fuzz_target};

/// The largest disk that is asked for, in bytes.
const MOST: u64 = 16 << 20;

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((image, plan)) = input.split_last_chunk::<32>() else {
        return Corpus::Reject;
    };
    if image.len() > 1 << 20 {
        return Corpus::Reject;
    }
    let opener = memory::InMemory::new(image, 0);
    let options = memory::options(plan[0] & 1 == 1);
    let Ok(image) = open_image(Path::new(memory::PATH), &opener, &options) else {
        return Corpus::Keep;
    };
    for step in plan[1..].chunks_exact(5) {
        perform(&*image, step);
    }
    Corpus::Keep
});

/// Errors are as good an answer as success.
fn perform(image: &dyn Image, step: &[u8]) {
    let size = image.size();
    let far = u64::from(u32::from_be_bytes([0, step[1], step[2], step[3]]));
    let offset = (far << (step[0] >> 4 & 7) << 6).min(size);
    let len = (u64::from(step[4]) * 331).min(size - offset);
    let mut buf = vec![step[4]; len as usize];
    let _ = match step[0] & 15 {
        0 | 1 => image.read(offset, &mut buf).is_ok(),
        2 | 3 => image.write(offset, &buf).is_ok(),
        4 => image.write_zeroes(offset, len, step[4] & 1 == 1).is_ok(),
        5 => image.discard(offset, len).is_ok(),
        6 => image.flush().is_ok(),
        7 => image.extent(offset, len.max(1)).is_ok(),
        other => change(image, other, far, step[4]),
    };
}

fn change(image: &dyn Image, what: u8, far: u64, byte: u8) -> bool {
    let Some(image) = image.as_qcow2() else {
        return false;
    };
    let name = (byte & 3).to_string();
    match what {
        8 => {
            let new = NewSnapshot {
                id: None,
                name: &name,
                seconds: 1,
                nanoseconds: 2,
            };
            image.create_snapshot(new).is_ok()
        }
        9 => image.apply_snapshot(&name).is_ok(),
        10 => image.delete_snapshot(&name).is_ok(),
        11 => {
            let how = if byte & 1 == 1 {
                Preallocation::Metadata
            } else {
                Preallocation::Off
            };
            image.resize(far % MOST / 512 * 512, how).is_ok()
        }
        12 => image.add_bitmap(&name, None, byte & 4 == 4).is_ok(),
        13 => image.remove_bitmap(&name).is_ok(),
        14 => {
            let cluster = vec![byte; 1 << (9 + far % 13)];
            let offset = far / cluster.len() as u64 * cluster.len() as u64;
            image.write_compressed(offset, &cluster).is_ok()
        }
        _ => image.close().is_ok(),
    }
}
