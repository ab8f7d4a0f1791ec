//! What leads to the host: hvc0, a named port, COM2, QEMU's guest agent over its port, and stream sockets.

use super::{MIB, case};
use crate::case::{Action, Ask, Case, Fill, Form, Talk, Want};

const SCRIPT: &str = r#"
until_() {
    n=0
    until eval "$1"; do
        n=$((n + 1))
        [ $n -gt 300 ] && { echo "@@ bad: never $1"; return; }
        sleep 0.05
    done
}
echo "@@ ports: $(cat /sys/class/virtio-ports/*/name | sort | tr '\n' ' ')"
port() { for p in /sys/class/virtio-ports/*; do [ "$(cat "$p/name")" = "$1" ] && echo "/dev/$(basename "$p")"; done; }

echo 'over COM2' > /dev/ttyS1 && stty -F /dev/ttyS1 cs8 && echo '@@ wrote to COM2'

(echo 'login on hvc0'; read -r line; echo "welcome $line") < /dev/hvc0 > /dev/hvc0 &
echo '@@ ask hvc0'
wait
echo '@@ hvc0 was asked'
# A size is that of an open terminal.
exec 6<> /dev/hvc0
echo '@@ ask for another size'
until_ '[ "$(stty size <&6 2> /dev/null)" = "50 132" ]'
exec 6>&-
echo '@@ hvc0 is as large as its window'

exec 4<> "$(port echo)"
# While nobody is there on the host, reading ends at once.
(while :; do if read -r line <&4; then echo "echo of $line" >&4; else sleep 0.05; fi; done) &
echo '@@ ask the port'

for time in first second; do
    echo "@@ a port is to come for the $time time"
    until [ -n "$(port late)" ]; do sleep 0.05; done
    exec 5<> "$(port late)"
    until read -r line <&5; do sleep 0.05; done
    echo "the $time: $line" >&5
    echo "@@ the port has heard $line for the $time time"
    until [ -z "$(port late)" ]; do sleep 0.05; done
    exec 5>&-
done

echo '@@ ask for sockets'
sockets() { ls -d /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio* > /dev/null 2>&1; }
until_ sockets
vsock echo 52 &
listener=$!
# The host's port 99 is the socket of clients itself: round and round.
dd if=/dev/urandom of=/tmp/noise bs=64k count=8 2>/dev/null
round() { (echo 'CONNECT 52'; cat /tmp/noise) | vsock connect 2 99 > /tmp/round && [ -s /tmp/round ]; }
until_ round
tail -n +2 /tmp/round | cmp - /tmp/noise && echo "@@ $(head -c 2 /tmp/round) over two connections"
vsock connect 2 9 < /dev/null 2>/tmp/why || echo "@@ refused: $(grep -c reset /tmp/why)"
echo '@@ ask the echo, and for its removal'
until_ '! sockets'
echo '@@ no sockets any more'
kill $listener

ip link set lo up
mkdir -p /mnt /sbin /run /var/run
mke2fs /dev/vda > /tmp/mke2fs 2>&1 && mount -t ext4 /dev/vda /mnt && echo '@@ a file system to freeze'
printf '#!/bin/sh\ntouch /tmp/ended\n' > /sbin/shutdown
chmod 755 /sbin/shutdown
qemu-ga -m virtio-serial -p "$(port org.qemu.guest_agent.0)" -t /tmp -f /tmp/agent.pid -l /tmp/agent.log &
echo '@@ ask the agent'
n=0
until [ -e /tmp/ended ]; do
    n=$((n + 1))
    [ $n -gt 600 ] && { echo '@@ bad: the agent does not end'; cat /tmp/agent.log; break; }
    sleep 0.1
done
echo '@@ the agent ends the guest'
dmesg | grep -E 'BUG:|WARNING: CPU|Oops|Call Trace|rcu:.*stall' | sed 's/^/@@ bad: /'
"#;

/// The same by the command line, to the guest's end. A verb that fails ends the script.
const AGENT: &str = r#"
agent() { "$VIREO" agent "$@" --api-socket {dir}/api.sock; }
is() { said=$(agent $2); [ "$said" = "$1" ] || { echo "agent $2: $said"; exit 1; }; }
agent ping
agent info > info
grep -q 'Version  *[0-9]' info && grep -q guest-fsfreeze-freeze info
agent info --json | grep -q '"guest-shutdown"'
agent network > network
grep '^lo ' network | grep -q '127.0.0.1/8'
agent network --json | grep -q '"127.0.0.1"'
is '1 file systems are frozen' fsfreeze
is frozen fsstatus
agent fsstatus --json | grep -q '"frozen"'
is '1 file systems are thawed' fsthaw
is thawed fsstatus
agent shutdown --mode powerdown
echo '@@ asked by the command line'
"#;

fn description() -> String {
    r#"{"payload":{"kernel":"{kernel}","initramfs":"{initramfs}","cmdline":"{cmdline}"},
"disks":[{"path":"{dir}/disk","image_type":"Raw"}],
"serial":{"mode":"Tty"},"serial2":{"mode":"File","file":"{dir}/com2"},
"console":{"mode":"Socket","socket":"{dir}/hvc0"},
"ports":[{"name":"org.qemu.guest_agent.0"},{"name":"echo","socket":"{dir}/echo"}]}"#
        .to_owned()
}

fn talk(socket: &str, say: &str, hear: &str) -> Action {
    Action::Talk(Talk {
        socket: socket.to_owned(),
        say: say.to_owned(),
        hear: hear.to_owned(),
    })
}

/// A port is added while the guest runs.
fn come() -> Ask {
    let port = r#"{"name":"late","socket":"{dir}/late"}"#;
    Ask::put("vm.add-port", port).answered(200)
}

/// It is taken away again.
fn go() -> Ask {
    Ask::put("vm.remove-port", r#"{"name":"late"}"#)
}

/// A port comes and goes, and another takes its place.
fn late(case: Case) -> Case {
    case.asks("@@ a port is to come for the first time", [come()])
        .step("", talk("late", "one\n", "the first: one"))
        .asks("@@ the port has heard one for the first time", [go()])
        .asks("@@ a port is to come for the second time", [come()])
        .step("", talk("late", "two\n", "the second: two"))
        .asks("@@ the port has heard two for the second time", [go()])
}

/// A socket device comes, a client talks to the guest through it, and it goes.
fn sockets(case: Case) -> Case {
    let vsock = r#"{"cid":3,"socket":"{dir}/v"}"#;
    let place = Want::Text(r#"{"id":"_vsock"#.to_owned());
    let comes = [
        Ask::put("vm.add-vsock", vsock).answered(200).want(place),
        Ask::put("vm.add-vsock", r#"{"cid":4,"socket":"{dir}/w"}"#).answered(409),
        Ask::get("vm.info", &[r#""cid":3"#]),
    ];
    let gone = || Want::NoText("_vsock".to_owned());
    let goes = [
        Ask::get("vm.counters", &[r#""connections":"#, r#""tx_packets":"#]),
        Ask::put("vm.remove-device", r#"{"id":"_vsock1"}"#),
        Ask::get("vm.devices", &[]).want(gone()).until(),
        Ask::get("vm.info", &[]).want(gone()),
    ];
    // Not so much that it would have to be read before all is written.
    let text = "All of this comes back. ".repeat(2000);
    let ask = "@@ ask the echo, and for its removal";
    case.before("ln -s v v_99")
        .asks("@@ ask for sockets", comes)
        .step(ask, talk("v", &format!("CONNECT 52\n{text}"), &text))
        .asks("", goes)
        .lines([
            "@@ OK over two connections",
            "@@ refused: 1",
            "@@ no sockets any more",
        ])
}

/// Both ways over each of them, and all that the agent can be asked.
pub(super) fn all(kernel: &str) -> Case {
    let boots = [
        Ask::put("vm.create", &description()),
        Ask::put("vm.boot", ""),
        Ask::put("vm.agent-ping", "")
            .answered(409)
            .want(Want::Text("no agent".to_owned())),
    ];
    let size = Ask::put("vm.console-size", r#"{"columns":132,"rows":50}"#);
    let log = r#"{"add":"file={dir}/late.log","port":"console"}"#;
    let log = Ask::put("vm.console", log);
    let filesystems = |count: &str| Want::Text(format!(r#""filesystems":{count}"#));
    let agent = [
        Ask::put("vm.agent-ping", "").until(),
        Ask::get("vm.agent-info", &["guest-fsfreeze-freeze"]),
        Ask::get("vm.agent-network", &[r#""name":"lo""#, "127.0.0.1"]),
        Ask::put("vm.agent-fsfreeze", "")
            .answered(200)
            .want(filesystems("1")),
        Ask::get("vm.agent-fsstatus", &["frozen"]),
        Ask::put("vm.agent-fsthaw", "")
            .answered(200)
            .want(filesystems("1")),
        Ask::get("vm.agent-fsstatus", &["thawed"]),
        Ask::get("vm.counters", &["tx_bytes", "control_messages"]),
    ];
    let mut case = case(kernel, Form::BzImage, "consoles-and-the-agent", SCRIPT)
        .served()
        .file("disk", 8 * MIB, Fill::Zero)
        .asks("", boots)
        .step("@@ ask hvc0", talk("hvc0", "root\n", "welcome root"))
        .asks("@@ ask for another size", [size, log])
        .step("@@ ask the port", talk("echo", "one\ntwo\n", "echo of two"));
    case = sockets(late(case))
        .asks("@@ ask the agent", agent)
        .step("", Action::Run(AGENT.to_owned()))
        .lines([
            "@@ ports: echo org.qemu.guest_agent.0",
            "@@ wrote to COM2",
            "@@ hvc0 was asked",
            "@@ hvc0 is as large as its window",
            "@@ a file system to freeze",
            "@@ asked by the command line",
            "@@ the agent ends the guest",
            "@@ the socket is gone",
            "over COM2",
        ])
        .after("cat com2; [ -e v ] || echo '@@ the socket is gone'")
        .limit(240);
    case.guest_agent = true;
    case
}
