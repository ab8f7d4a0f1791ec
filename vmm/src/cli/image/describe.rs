//! What is known about an image, in qemu-img's words and JSON.

use std::fmt::Write as _;

use block::Compression;
use block::ops::{BitmapFlag, BitmapInfo, HumanSize, ImageInfo, Qcow2Info, SnapshotInfo};
use serde_json::{Value, json};

/// JSON for programs, as qemu-img indents it.
pub(super) fn to_json(value: &Value) -> String {
    let mut text = Vec::new();
    let format = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut writer = serde_json::Serializer::with_formatter(&mut text, format);
    // Values without maps of odd keys can always be written to memory.
    let _ = serde::Serialize::serialize(value, &mut writer);
    String::from_utf8(text).unwrap_or_default()
}

/// An image as JSON.
pub(super) fn json(info: &ImageInfo) -> Value {
    let file = info.path.to_string_lossy();
    let mut all = json!({
        "children": [{
            "name": "file",
            "info": {
                "children": [],
                "virtual-size": info.file_length.next_multiple_of(512),
                "filename": file,
                "format": protocol(info),
                "actual-size": info.actual_size,
                "format-specific": { "type": protocol(info), "data": {} },
                "dirty-flag": false,
            },
        }],
        "virtual-size": info.virtual_size,
        "filename": file,
        "format": info.format.name(),
        "actual-size": info.actual_size,
        "dirty-flag": info.qcow2.as_ref().is_some_and(|qcow2| qcow2.dirty),
    });
    let (Some(map), Some(qcow2)) = (all.as_object_mut(), &info.qcow2) else {
        return all;
    };
    let mut add = |key: &str, value: Value| map.insert(key.to_owned(), value);
    add("cluster-size", qcow2.cluster_size.into());
    if let Some(top) = &info.unfinished {
        add("unfinished-merge", top.as_str().into());
    }
    add(
        "format-specific",
        json!({ "type": "qcow2", "data": specific(qcow2) }),
    );
    if let (Some(name), Some(path)) = (&qcow2.backing, &qcow2.backing_path) {
        add("backing-filename", name.to_string_lossy().into());
        add("full-backing-filename", path.to_string_lossy().into());
        if let Some(format) = &qcow2.backing_format {
            add("backing-filename-format", format.as_str().into());
        }
    }
    if !qcow2.snapshots.is_empty() {
        let list: Vec<Value> = qcow2.snapshots.iter().map(snapshot).collect();
        add("snapshots", list.into());
    }
    all
}

/// What QEMU calls the way to the file.
fn protocol(info: &ImageInfo) -> &'static str {
    if info.device { "host_device" } else { "file" }
}

fn specific(qcow2: &Qcow2Info) -> Value {
    let mut all = json!({
        "compat": compat(qcow2),
        "compression-type": compression(qcow2),
        "refcount-bits": qcow2.refcount_bits,
    });
    let Some(map) = all.as_object_mut().filter(|_| qcow2.version >= 3) else {
        return all;
    };
    let mut add = |key: &str, value: Value| map.insert(key.to_owned(), value);
    add("lazy-refcounts", qcow2.lazy_refcounts.into());
    add("corrupt", qcow2.corrupt.into());
    add("extended-l2", qcow2.extended_l2.into());
    if let Some(name) = &qcow2.data_file {
        add("data-file", name.to_string_lossy().into());
        add("data-file-raw", qcow2.data_file_raw.into());
    }
    if !qcow2.bitmaps.is_empty() {
        let list: Vec<Value> = qcow2.bitmaps.iter().map(bitmap).collect();
        add("bitmaps", list.into());
    }
    all
}

fn compat(qcow2: &Qcow2Info) -> &'static str {
    if qcow2.version >= 3 { "1.1" } else { "0.10" }
}

fn compression(qcow2: &Qcow2Info) -> &'static str {
    match qcow2.compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    }
}

fn flags(bitmap: &BitmapInfo) -> impl Iterator<Item = &'static str> {
    bitmap.flags.iter().map(|flag| match flag {
        BitmapFlag::InUse => "in-use",
        BitmapFlag::Auto => "auto",
    })
}

fn bitmap(bitmap: &BitmapInfo) -> Value {
    json!({
        "name": bitmap.name,
        "granularity": bitmap.granularity,
        "flags": flags(bitmap).collect::<Vec<_>>(),
    })
}

fn snapshot(snapshot: &SnapshotInfo) -> Value {
    let mut all = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.seconds,
        "date-nsec": snapshot.nanoseconds,
        "vm-clock-sec": snapshot.vm_clock / 1_000_000_000,
        "vm-clock-nsec": snapshot.vm_clock % 1_000_000_000,
    });
    if let (Some(map), Some(count)) = (all.as_object_mut(), snapshot.instructions) {
        map.insert("icount".to_owned(), count.into());
    }
    all
}

/// An image as lines for people.
pub(super) fn text(info: &ImageInfo) -> String {
    let mut all = String::new();
    let mut line = |text: String| {
        all.push_str(&text);
        all.push('\n');
    };
    let file = info.path.display();
    line(format!("image: {file}"));
    line(format!("file format: {}", info.format.name()));
    line(format!("virtual size: {}", both(info.virtual_size)));
    line(format!("disk size: {}", HumanSize(info.actual_size)));
    if let Some(qcow2) = &info.qcow2 {
        line(format!("cluster_size: {}", qcow2.cluster_size));
        if qcow2.dirty {
            line("cleanly shut down: no".to_owned());
        }
        if let Some(top) = &info.unfinished {
            line(format!("unfinished merge of: {top}"));
        }
        if let (Some(name), Some(path)) = (&qcow2.backing, &qcow2.backing_path) {
            let name_text = name.to_string_lossy();
            if path.as_os_str() == name.as_os_str() {
                line(format!("backing file: {name_text}"));
            } else {
                line(format!(
                    "backing file: {name_text} (actual path: {})",
                    path.display()
                ));
            }
        }
        if let Some(format) = &qcow2.backing_format {
            line(format!("backing file format: {format}"));
        }
        if !qcow2.snapshots.is_empty() {
            line(snapshots(&qcow2.snapshots).trim_end().to_owned());
        }
        line(specific_text(qcow2).trim_end().to_owned());
    }
    line("Child node '/file':".to_owned());
    line(format!("    filename: {file}"));
    line(format!("    protocol type: {}", protocol(info)));
    line(format!(
        "    file length: {}",
        both(info.file_length.next_multiple_of(512))
    ));
    line(format!("    disk size: {}", HumanSize(info.actual_size)));
    all
}

fn both(size: u64) -> String {
    format!("{} ({size} bytes)", HumanSize(size))
}

/// What only qcow2 images have, as lines.
pub(super) fn specific_text(qcow2: &Qcow2Info) -> String {
    let mut all = String::from("Format specific information:\n");
    let mut line = |key: &str, value: &dyn std::fmt::Display| {
        // Writing to a string cannot fail.
        let _ = writeln!(all, "    {key}: {value}");
    };
    line("compat", &compat(qcow2));
    line("compression type", &compression(qcow2));
    if qcow2.version < 3 {
        line("refcount bits", &qcow2.refcount_bits);
        return all;
    }
    line("lazy refcounts", &qcow2.lazy_refcounts);
    if !qcow2.bitmaps.is_empty() {
        let mut list = String::new();
        for (index, bitmap) in qcow2.bitmaps.iter().enumerate() {
            let _ = write!(list, "\n        [{index}]:\n            flags:");
            for (index, flag) in flags(bitmap).enumerate() {
                let _ = write!(list, "\n                [{index}]: {flag}");
            }
            let _ = write!(list, "\n            name: {}", bitmap.name);
            let _ = write!(list, "\n            granularity: {}", bitmap.granularity);
        }
        // The list begins on the next line.
        let _ = writeln!(all, "    bitmaps:{list}");
    }
    let mut line = |key: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(all, "    {key}: {value}");
    };
    line("refcount bits", &qcow2.refcount_bits);
    if let Some(name) = &qcow2.data_file {
        line("data file", &name.to_string_lossy());
        line("data file raw", &qcow2.data_file_raw);
    }
    line("corrupt", &qcow2.corrupt);
    line("extended l2", &qcow2.extended_l2);
    all
}

/// A list of snapshots as a table.
pub(super) fn snapshots(list: &[SnapshotInfo]) -> String {
    let mut all = String::from("Snapshot list:\n");
    let mut row = |cells: [&str; 6]| {
        let [id, tag, size, date, clock, count] = cells;
        let _ = writeln!(
            all,
            "{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {count:>10}"
        );
    };
    row(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
    for snapshot in list {
        let millis = snapshot.vm_clock / 1_000_000;
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            millis / 3_600_000,
            millis / 60_000 % 60,
            millis / 1000 % 60,
            millis % 1000
        );
        let count = snapshot
            .instructions
            .map_or_else(|| "--".to_owned(), |count| count.to_string());
        row([
            &snapshot.id,
            &snapshot.name,
            &HumanSize(snapshot.vm_state_size).to_string(),
            &local_date(snapshot.seconds),
            &clock,
            &count,
        ]);
    }
    all
}

/// A time in this machine's time zone.
#[expect(unsafe_code, reason = "the system's time zones have no safe wrapper")]
fn local_date(seconds: u32) -> String {
    let time = libc::time_t::from(seconds);
    // SAFETY: all bytes zero are a valid `tm`: numbers and a null pointer.
    let mut parts: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to values of the right type that outlive the call.
    let converted = unsafe { libc::localtime_r(&raw const time, &raw mut parts) };
    if converted.is_null() {
        return seconds.to_string();
    }
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        parts.tm_year + 1900,
        parts.tm_mon + 1,
        parts.tm_mday,
        parts.tm_hour,
        parts.tm_min,
        parts.tm_sec
    )
}
