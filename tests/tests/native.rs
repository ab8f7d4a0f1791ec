//! Small guests on the machine's own `/dev/kvm`; without one, in the nested machine.

use tests::{guests, suite};

#[test]
fn small_guests() -> Result<(), suite::Failed> {
    suite::run("native", guests::cases())
}
