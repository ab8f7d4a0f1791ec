//! Events as `text/event-stream` (HTML standard, section 9.2).

use std::sync::Arc;

use super::json;
use crate::Event;

/// Appends an event, as it goes over the wire.
pub(super) fn write(output: &mut Vec<u8>, event: &Arc<Event>) {
    // Events hold no paths that are no UTF-8, and no keys that are no strings.
    let data = json::write(event.as_ref()).unwrap_or_default();
    output.extend_from_slice(format!("id: {}\nevent: ", event.id).as_bytes());
    output.extend_from_slice(kind(&data));
    output.extend_from_slice(b"\ndata: ");
    output.extend_from_slice(&data);
    output.extend_from_slice(b"\n\n");
}

/// Appends what keeps a silent stream from looking dead.
pub(super) fn write_heartbeat(output: &mut Vec<u8>) {
    output.extend_from_slice(b":\n\n");
}

/// The event's kind, which is the first string in what it is written as: only
/// numbers come before.
fn kind(data: &[u8]) -> &[u8] {
    const BEFORE: &[u8] = br#""kind":""#;
    let at = data
        .windows(BEFORE.len())
        .position(|window| window == BEFORE);
    let behind = at.map_or(&[][..], |at| &data[at + BEFORE.len()..]);
    behind
        .split(|byte| *byte == b'"')
        .next()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EventKind, VmState};

    #[test]
    fn an_event_is_written_with_number_kind_and_data() {
        let mut output = Vec::new();
        let event = |id, kind| Arc::new(Event { id, at_us: 5, kind });
        let state = EventKind::State {
            state: VmState::Running,
            pause: None,
        };
        write(&mut output, &event(7, state));
        write(&mut output, &event(8, EventKind::GuestReset));
        let id = "é".to_owned();
        write(
            &mut output,
            &event(9, EventKind::DiskResized { id, size: 1 }),
        );
        write_heartbeat(&mut output);
        assert_eq!(
            String::from_utf8(output).unwrap(),
            "id: 7\nevent: state\ndata: {\"seq\":7,\"at_us\":5,\"kind\":\"state\",\"state\":\"running\"}\n\n\
             id: 8\nevent: guest_reset\ndata: {\"seq\":8,\"at_us\":5,\"kind\":\"guest_reset\"}\n\n\
             id: 9\nevent: disk_resized\ndata: {\"seq\":9,\"at_us\":5,\"kind\":\"disk_resized\",\"id\":\"\\u00e9\",\"size\":1}\n\n\
             :\n\n"
        );
    }
}
