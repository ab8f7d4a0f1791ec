//! A guest that goes to another host and back over TLS while it works: first before its memory, when an operator says so, then with
//! its disk.

use super::case;
use super::moved::{END, GUEST, HOSTS, LOG, TALK, THIRD, TRACE, WAYS, WORDS, WORKER};
use crate::case::{Action, Case, Form};
use crate::certificates;

/// Seconds for both ways.
const LIMIT: u64 = 480;

/// Memory hardly moves until the guest has been let go: nearly all of it follows.
const THERE: &str = r#"
there "$VIREO" receive m1 tcp:10.90.0.3:4001 --tls tls --serial file=console-1 --log-file log-1 --detach > /dev/null
"$VIREO" migrate m0 tcp:10.90.0.3:4001 --tls tls --postcopy --bandwidth 4M > report 2>&1 &
mover=$!
until_ '"$VIREO" migrate-status m0 | grep -q "^Phase.*precopy"'
"$VIREO" migrate-set m0 --postcopy
until_ '"$VIREO" migrate-status m1 | grep -q "^Phase.*postcopy"'
echo "@@ before its memory: $("$VIREO" migrate-status m0 | grep ^Left) when it runs there"
"$VIREO" migrate-set m0 --bandwidth 0
wait $mover || { cat report >&2; exit 1; }
arrives 1
echo "@@ way 1: $(cat report)"
"#;

/// The image that it had is not that which it has then.
const BACK: &str = r#"
"$VIREO" receive m2 tcp:10.90.0.1:4002 --tls tls --disk id=_disk0,path=back.qcow2 --serial file=console-2 --log-file log-2 --detach > /dev/null
"$VIREO" migrate m1 tcp:10.90.0.1:4002 --tls tls --copy-storage all --max-downtime 3s > report 2>&1 || { cat report >&2; exit 1; }
mv work.qcow2 old.qcow2
arrives 2
echo "@@ way 2: $(cat report)"
last=2
"#;

/// Files of a directory, made by a script.
fn directory(name: &str, files: &[(&str, String)]) -> String {
    let file = |(file, text): &(&str, String)| {
        format!("cat > {name}/{file} << 'END'\n{}\nEND\n", text.trim_end())
    };
    let files: String = files.iter().map(file).collect();
    format!("mkdir {name}\n{files}")
}

/// Post-copy that is asked for by hand, and a disk that goes along, both over TLS.
pub(super) fn goes_over_tls(kernel: &str) -> Case {
    let log = LOG.to_string();
    // Without them the case fails where they are read.
    let tls = certificates::files(&["10.90.0.1", "10.90.0.3"]).unwrap_or_default();
    let end = END.replace("LOG", &log).replace("work.qcow2", "back.qcow2");
    let moves = format!("{TRACE}{WORDS}{WAYS}{TALK}{THERE}{BACK}{end}");
    let script = format!("{WORKER}{}", GUEST.replace("LOG", &log));
    let before = format!("{WORDS}{HOSTS}{THIRD}{}", directory("tls", &tls));
    let mut case = case(kernel, Form::Pvh, "goes-over-tls", &script)
        .before(&before)
        .args("--name m0 --cpus boot=2 --memory size=192M")
        .args("--disk path={dir}/work.qcow2,format=qcow2 --net tap=guest,mac=52:54:00:00:90:02")
        .step("@@ works", Action::Run(moves))
        .lines(["@@ went to and fro"])
        .limit(LIMIT);
    // It makes namespaces and what joins them.
    case.nested_only = true;
    case.net_host = true;
    case
}
