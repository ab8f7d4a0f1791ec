//! Random chains of images, copied, rebased and committed, against QEMU's reading of them.
//!
//! `IMAGE_SEQUENCES` says how many, `IMAGE_SEED` where they begin. A failure names its seed.

use std::fs;

use crate::place::Place;

const SECTOR: u64 = 512;

/// A small repeatable generator (xorshift64*).
struct Rng(u64);

impl Rng {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % bound
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// Images each on the one before, as (name, format, size in bytes).
fn chain(place: &Place, rng: &mut Rng) -> Vec<(String, &'static str, u64)> {
    let mut images: Vec<(String, &'static str, u64)> = Vec::new();
    for depth in 0..=rng.below(4) {
        let name = format!("image{depth}");
        let size = (1 + rng.below(40)) << 19;
        let format = if depth == 0 && rng.below(5) < 2 {
            "raw"
        } else {
            "qcow2"
        };
        let text = size.to_string();
        let mut arguments = vec!["create", "-q", "-f", format];
        if format == "qcow2" {
            let options = [
                "cluster_size=512",
                "cluster_size=4k",
                "cluster_size=64k",
                "cluster_size=2M",
                "extended_l2=on",
                "compat=0.10",
            ];
            arguments.extend(["-o", rng.pick(&options)]);
        }
        if let Some((below, format, _)) = images.last() {
            arguments.extend(["-b", below, "-F", format]);
        }
        arguments.extend([&*name, &*text]);
        place.qemu(&arguments).done();
        let commands: Vec<String> = (0..rng.below(13))
            .map(|_| {
                let offset = rng.below(size / SECTOR) * SECTOR;
                let len = ((1 + rng.below(2000)) * SECTOR).min(size - offset);
                let what =
                    rng.pick(&["write -P", "write -P", "write -z", "write -z -u", "discard"]);
                match what {
                    "write -P" => format!("{what} {} {offset} {len}", 1 + rng.below(255)),
                    _ => format!("{what} {offset} {len}"),
                }
            })
            .collect();
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        if !commands.is_empty() {
            place.qemu_io(&name, format, &commands).done();
        }
        images.push((name, format, size));
    }
    images
}

/// Copies in several formats hold what the original does.
fn converted(place: &Place, rng: &mut Rng, top: &str, format: &str, holds: &dyn Fn(&str, &str)) {
    let options = rng.pick(&[
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
        "compat=0.10",
    ]);
    for (target, flags) in [
        ("raw", &["-m", "16"][..]),
        ("qcow2", &["-m", "16", "-W", "-o", options]),
        (
            "qcow2",
            &[
                "-m",
                "16",
                "-c",
                "-o",
                "cluster_size=4k,compression_type=zstd",
            ],
        ),
    ] {
        let arguments = [
            &["convert", "-f", format, "-O", target],
            flags,
            &[top, "copy"],
        ]
        .concat();
        place.vireo(&arguments).done();
        holds("copy", target);
        fs::remove_file(place.path("copy")).unwrap();
    }
}

fn run(seed: u64) {
    let place = Place::new();
    let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let images = chain(&place, &mut rng);
    let (top, format, size) = images.last().unwrap();
    place
        .qemu(&["convert", "-f", format, "-O", "raw", top, "wanted"])
        .done();
    let holds = |name: &str, format: &str| {
        let same = place.qemu(&["compare", "-f", "raw", "-F", format, "wanted", name]);
        assert_eq!(same.code, 0, "seed {seed}: {name}: {same:?}");
        let sound = place.qemu(&["check", "-q", "-f", format, name]);
        assert!(
            sound.code == 0 || format == "raw",
            "seed {seed}: {name}: {sound:?}"
        );
    };
    converted(&place, &mut rng, top, format, &holds);
    let [.., (base, base_format, base_size), _] = &images[..] else {
        return;
    };
    let arguments = [
        "convert",
        "-O",
        "qcow2",
        "-B",
        base,
        "-F",
        base_format,
        top,
        "copy",
    ];
    place.vireo(&arguments).done();
    holds("copy", "qcow2");
    let below: Vec<&(String, &str, u64)> = images.iter().take(images.len() - 1).collect();
    let (other, other_format, _) = rng.pick(&below);
    for flags in [&["-b", ""][..], &["-b", other, "-F", other_format]] {
        fs::copy(place.path(top), place.path("moved")).unwrap();
        place
            .vireo(&[&["rebase"], flags, &["moved"]].concat())
            .done();
        holds("moved", "qcow2");
    }
    if *base_format == "raw" || base_size >= size {
        place.vireo(&["commit", top]).done();
        holds(top, "qcow2");
        place.qemu(&["check", "-q", "-f", base_format, base]);
        if base_size <= size {
            holds(base, base_format);
        }
    }
}

#[test]
fn random_chains_hold_the_same_after_every_operation() {
    let first = setting("IMAGE_SEED", 1);
    for seed in first..first + setting("IMAGE_SEQUENCES", 8) {
        run(seed);
    }
}
