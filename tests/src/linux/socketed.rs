//! A guest and its host talk over stream sockets, both with socat, as does everybody who has no program of his own for them;
//! and the guest restarts while they do.

use super::{MIB, case};
use crate::case::{Action, Ask, Case, Fill, Form, Want};

/// What is sent each way and comes back.
const DATA: u64 = MIB;

/// Who listens for the guest: one counts its boots, one gives back what it is sent, one takes what comes until it ends, and the
/// last tells what has become of connections.
const HOST: &str = r#"
exec 2> /dev/null
exec > /dev/null
socat UNIX-LISTEN:v_2001,fork SYSTEM:'echo boot >> boots; wc -l < boots' &
socat UNIX-LISTEN:v_2002,fork EXEC:cat &
(socat -u UNIX-LISTEN:v_2003 CREATE:kept; echo "the guest's" >> closed) &
socat UNIX-LISTEN:v_2004,fork SYSTEM:'cat kept talked closed; true' &
"#;

const GUEST: &str = r#"
until_() {
    n=0
    until eval "$1" 2> /dev/null; do
        n=$((n + 1))
        [ $n -gt 300 ] && { echo "@@ bad: never $1"; return; }
        sleep 0.05
    done
}
until_ 'boot=$(socat -u VSOCK-CONNECT:2:2001 - | tr -d " ") && [ -n "$boot" ]'
host() { socat -u VSOCK-CONNECT:2:2004 -; }
socat VSOCK-LISTEN:52,reuseaddr,fork EXEC:cat &
dd if=/dev/urandom of=/tmp/noise bs=64k count=16 2> /dev/null
socat -t 60 - VSOCK-CONNECT:2:2002 < /tmp/noise > /tmp/back
cmp /tmp/noise /tmp/back && echo "@@ boot $boot: what the host was sent came back"
socat -u VSOCK-CONNECT:2:9 - 2>&1 | grep -q 'reset by peer' && echo "@@ boot $boot: nobody there"
if [ "$boot" = 1 ]; then
    echo '@@ ask for a connection'
    until_ 'host | grep -q talked'
    (echo held; exec sleep 10000) | socat -u - VSOCK-CONNECT:2:2003 &
    until_ 'host | grep -q held'
    echo '@@ restarts with two connections'
    drain
    reboot -f
    sleep 1000
fi
until_ "host | grep -q \"^the guest's\""
until_ "host | grep -q \"^the host's\""
echo '@@ the host has seen the end of both'
echo '@@ ask for another connection'
until_ 'host | grep -q again'
"#;

/// Sends a file to the guest, and gets it back.
const TALK: &str = r#"
(echo 'CONNECT 52'; cat noise) | socat -t 60 - UNIX-CONNECT:v > back
grep -q '^OK ' back && head -n 1 back | wc -c > start
tail -c +$(($(cat start) + 1)) back | cmp - noise && echo "@@ what the guest was sent came back: $word"
"#;

/// Holds a connection, too, that the guest's end of it ends.
const HOLD: &str = r#"
(
    socat UNIX-CONNECT:v SYSTEM:'echo CONNECT 52; echo talks; cat > held'
    echo "the host's" >> closed
) > /dev/null 2>&1 &
n=0
until grep -q talks held 2> /dev/null; do
    n=$((n + 1))
    [ $n -gt 300 ] && echo '@@ bad: never held' && break
    sleep 0.05
done
echo talked > talked
"#;

fn description() -> String {
    r#"{"memory":{"size":201326592},
"payload":{"kernel":"{kernel}","initramfs":"{initramfs}","cmdline":"{cmdline}"},
"vsock":{"cid":3,"socket":"{dir}/v"},
"serial":{"mode":"Tty"},"console":{"mode":"Off"}}"#
        .to_owned()
}

fn talk(word: &str, then: &str) -> Action {
    Action::Run(format!("word={word}\n{TALK}{then}"))
}

/// Both ways, and over a restart of the guest, which ends all connections and makes none.
pub(super) fn talks_with_socat(kernel: &str) -> Case {
    let boots = [
        Ask::put("vm.create", &description()),
        Ask::put("vm.boot", ""),
    ];
    let mut case = case(kernel, Form::BzImage, "sockets-with-socat", GUEST)
        .served()
        .file("noise", DATA, Fill::Noise)
        .before(HOST)
        .asks("", boots)
        .step("@@ ask for a connection", talk("first", HOLD))
        .step(
            "@@ ask for another connection",
            talk("second", "echo again >> talked"),
        )
        .lines([
            "@@ boot 1: what the host was sent came back",
            "@@ boot 1: nobody there",
            "@@ what the guest was sent came back: first",
            "@@ restarts with two connections",
            "@@ boot 2: what the host was sent came back",
            "@@ boot 2: nobody there",
            "@@ the host has seen the end of both",
            "@@ what the guest was sent came back: second",
        ])
        .want(Want::Times("@@ up".to_owned(), 2))
        .after("killall socat")
        .limit(240);
    case.nested_only = true;
    case.net_tools = true;
    case
}
