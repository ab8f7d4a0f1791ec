use std::io::{BufRead, BufReader, Write};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use super::*;

/// Long enough for anything; passing it is a failure.
const LONG: Duration = Duration::from_secs(20);

type Told = Result<Reply, ControlError>;

pub(crate) struct Bench {
    pub(crate) desk: AgentDesk,
    guest: Arc<GuestSide>,
}

impl Bench {
    /// A desk whose agent is `agent`: given a question, it says these bytes.
    pub(crate) fn new(mut agent: impl FnMut(&Value) -> Vec<u8> + Send + 'static) -> Self {
        let (bench, far) = Self::quiet(LONG);
        thread::spawn(move || {
            let mut lines = BufReader::new(&far);
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
                let text: Vec<u8> = line.drain(..).filter(|byte| *byte != 0xff).collect();
                let question: Value = serde_json::from_slice(&text).unwrap();
                if (&far).write_all(&agent(&question)).is_err() {
                    return;
                }
            }
        });
        bench
    }

    /// A desk, and the agent's end of its line.
    fn quiet(patience: Duration) -> (Self, UnixStream) {
        let desk = AgentDesk(Arc::new(Desk {
            patience: Some(patience),
            ..Desk::default()
        }));
        let (near, far) = UnixStream::pair().unwrap();
        let guest = Arc::new(GuestSide::default());
        guest.set(true);
        desk.connect(near, Arc::clone(&guest));
        (Self { desk, guest }, far)
    }

    fn submit(&self, command: AgentCommand) -> Receiver<Told> {
        let (sender, receiver) = channel();
        let answer = move |told| sender.send(told).unwrap();
        self.desk.submit(command, Box::new(answer));
        receiver
    }

    fn ask(&self, command: AgentCommand) -> Told {
        self.submit(command).recv_timeout(2 * LONG).unwrap()
    }

    fn refusal(&self, command: AgentCommand) -> (ErrorKind, String) {
        let error = self.ask(command).unwrap_err();
        (error.kind, error.to_string())
    }
}

pub(crate) fn agreed(question: &Value) -> Option<Vec<u8>> {
    let number = question.get("arguments")?.get("id")?;
    let text = format!("{{\"return\": {number}}}\n");
    Some([&[0xff], text.as_bytes()].concat())
}

/// An agent that agrees, and answers everything else with `text`.
fn answering(text: &'static str) -> Bench {
    Bench::new(move |question| agreed(question).unwrap_or_else(|| format!("{text}\n").into_bytes()))
}

fn agent(reply: AgentReply) -> Told {
    Ok(Reply::Agent(reply))
}

#[test]
fn the_agents_answers_reach_who_has_asked() {
    assert_eq!(
        answering(r#"{"return": {}}"#).ask(AgentCommand::Ping),
        Ok(Reply::Done)
    );
    let info = answering(
        r#"{"return": {"version": "7.2.0", "supported_commands": [
            {"name": "guest-ping", "enabled": true, "success-response": true},
            {"name": "guest-exec", "enabled": false, "success-response": true}]}}"#
            .replace('\n', " ")
            .leak(),
    );
    let told = api::wire::AgentInfo {
        version: "7.2.0".to_owned(),
        commands: vec!["guest-ping".to_owned()],
    };
    assert_eq!(info.ask(AgentCommand::Info), agent(AgentReply::Info(told)));
    let frozen = answering(r#"{"return": 3}"#);
    let three = AgentReply::Filesystems(api::wire::AgentFilesystems { filesystems: 3 });
    assert_eq!(frozen.ask(AgentCommand::FsFreeze), agent(three.clone()));
    assert_eq!(frozen.ask(AgentCommand::FsThaw), agent(three));
    let status = answering(r#"{"return": "frozen"}"#).ask(AgentCommand::FsStatus);
    let frozen = api::wire::AgentFsState::Frozen;
    let told = api::wire::AgentFsStatus { status: frozen };
    assert_eq!(status, agent(AgentReply::FsStatus(told)));
}

#[test]
fn addresses_are_checked_and_names_are_plain() {
    let network = answering(
        r#"{"return": [{"name": "l\u001b[2Jo", "ip-addresses": [
            {"ip-address": "127.0.0.1", "prefix": 8, "ip-address-type": "ipv4"},
            {"ip-address": "::1", "prefix": 128}, {"ip-address": "1.2.3.4", "prefix": 33},
            {"ip-address": "$(reboot)", "prefix": 1}, 7]},
            {"name": "eth0", "hardware-address": "52:54:00:00:00:01"}, {}, 7]}"#
            .replace('\n', " ")
            .leak(),
    );
    let Ok(Reply::Agent(AgentReply::Network(told))) = network.ask(AgentCommand::Network) else {
        panic!("no interfaces");
    };
    assert_eq!(told.len(), 2);
    assert_eq!(told[0].name, "l[2Jo");
    let addresses = told[0].addresses.iter();
    let addresses: Vec<_> = addresses
        .map(|a| format!("{}/{}", a.address, a.prefix))
        .collect();
    assert_eq!(addresses, ["127.0.0.1/8", "::1/128"]);
    assert_eq!(told[1].mac.as_deref(), Some("52:54:00:00:00:01"));
}

#[test]
fn what_was_said_before_is_no_answer() {
    let bench = Bench::new(|question| {
        let Some(mut agreement) = agreed(question) else {
            return b"{\"return\": {}}\n".to_vec();
        };
        // An answer that came too late, half a one, an agreement of long ago.
        let mut said = b"{\"return\": 9}\n{\"retu\xff{\"return\": 1234567}\n\xffnothing\n".to_vec();
        said.append(&mut agreement);
        said
    });
    for _ in 0..3 {
        assert_eq!(bench.ask(AgentCommand::Ping), Ok(Reply::Done));
    }
}

#[test]
fn numbers_that_are_agreed_on_begin_elsewhere_for_each_desk() {
    let two = || {
        let (sender, numbers) = channel();
        let bench = Bench::new(move |question| {
            let Some(agreement) = agreed(question) else {
                return b"{\"return\": {}}\n".to_vec();
            };
            let _ = sender.send(question["arguments"]["id"].as_u64());
            agreement
        });
        for _ in 0..2 {
            assert_eq!(bench.ask(AgentCommand::Ping), Ok(Reply::Done));
        }
        [(); 2].map(|()| numbers.recv().unwrap().unwrap())
    };
    let [first, second] = two();
    assert_eq!(second, first + 1);
    assert!(second < 1 << 53);
    assert_ne!(two()[0], first);
}

#[test]
fn without_an_agent_it_is_said_why() {
    let none = Bench {
        desk: AgentDesk::default(),
        guest: Arc::default(),
    };
    let (kind, why) = none.refusal(AgentCommand::Ping);
    assert_eq!(kind, ErrorKind::Conflict);
    assert!(why.contains("has no port"), "{why}");
    let (closed, _far) = Bench::quiet(LONG);
    closed.guest.set(false);
    let (kind, why) = closed.refusal(AgentCommand::Ping);
    assert_eq!(kind, ErrorKind::Conflict);
    assert!(
        why.contains("nothing in the guest has the agent's port open"),
        "{why}"
    );
    let (silent, _far) = Bench::quiet(Duration::from_millis(20));
    let (kind, why) = silent.refusal(AgentCommand::Ping);
    assert_eq!(kind, ErrorKind::Failed);
    assert!(why.contains("no answer: the agent's port is open"), "{why}");
}

#[test]
fn a_port_that_is_closed_meanwhile_ends_the_waiting() {
    let (bench, far) = Bench::quiet(LONG);
    let answer = bench.submit(AgentCommand::Ping);
    // It has been asked.
    BufReader::new(&far)
        .read_until(b'\n', &mut Vec::new())
        .unwrap();
    bench.guest.set(false);
    let error = answer.recv_timeout(LONG).unwrap().unwrap_err();
    assert_eq!(error.kind, ErrorKind::Conflict);
    // The machine ends.
    bench.guest.set(true);
    let answer = bench.submit(AgentCommand::Ping);
    bench.desk.disconnect();
    assert_eq!(
        answer.recv_timeout(LONG).unwrap().unwrap_err().kind,
        ErrorKind::Conflict
    );
}

#[test]
fn answers_that_make_no_sense_are_failures_with_their_reason() {
    let deep = format!("{{\"return\": {}", "[".repeat(100_000)).leak();
    for (text, part) in [
        ("nonsense", "what is no answer"),
        (deep, "what is no answer"),
        ("{}", "'return' is missing"),
        ("7", "'return' is missing"),
        (r#"{"return": {}}"#, "the version is missing"),
        (r#"{"return": null}"#, "the version is missing"),
        (
            r#"{"error": {"class": "X", "desc": "not \u001b[1mallowed"}}"#,
            "the agent refuses: not [1mallowed",
        ),
        (r#"{"error": 7}"#, "it does not say why"),
    ] {
        let (kind, why) = answering(text).refusal(AgentCommand::Info);
        assert_eq!(kind, ErrorKind::Failed);
        assert!(why.contains(part), "{text:.40}: {why}");
    }
    let (_, why) = answering(r#"{"return": -1}"#).refusal(AgentCommand::FsFreeze);
    assert!(why.contains("number of file systems"), "{why}");
    let (_, why) = answering(r#"{"return": {}}"#).refusal(AgentCommand::Network);
    assert!(why.contains("list of interfaces"), "{why}");
}

#[test]
fn an_agent_that_never_ends_its_line_is_not_read_for_ever() {
    for agrees in [true, false] {
        let bench = Bench::new(move |question| match agreed(question) {
            Some(agreement) if agrees => agreement,
            _ => vec![b'x'; 2 << 20],
        });
        let (_, why) = bench.refusal(AgentCommand::Ping);
        assert!(why.contains("without an answer"), "{why}");
    }
}

#[test]
fn a_guest_that_ends_says_nothing_and_one_that_will_not_says_why() {
    let (bench, far) = Bench::quiet(LONG);
    let answer = bench.submit(AgentCommand::Shutdown(AgentShutdownMode::Reboot));
    let mut lines = BufReader::new(&far);
    let mut line = Vec::new();
    lines.read_until(b'\n', &mut line).unwrap();
    let question: Value = serde_json::from_slice(&line[1..]).unwrap();
    (&far).write_all(&agreed(&question).unwrap()).unwrap();
    line.clear();
    lines.read_until(b'\n', &mut line).unwrap();
    let question: Value = serde_json::from_slice(&line).unwrap();
    let expected = json!({"execute": "guest-shutdown", "arguments": {"mode": "reboot"}});
    assert_eq!(question, expected);
    bench.guest.set(false);
    assert_eq!(answer.recv_timeout(LONG).unwrap(), Ok(Reply::Done));
    let refusing = answering(r#"{"error": {"class": "GenericError", "desc": "no"}}"#);
    let (_, why) = refusing.refusal(AgentCommand::Shutdown(AgentShutdownMode::Halt));
    assert!(why.contains("the agent refuses: no"), "{why}");
}

#[test]
fn questions_wait_for_their_turn_and_no_more_than_some() {
    let (bench, _far) = Bench::quiet(LONG);
    let mut waiting = Vec::new();
    let refused = loop {
        let answer = bench.submit(AgentCommand::Ping);
        match answer.try_recv() {
            Ok(told) => break told.unwrap_err(),
            Err(_) => waiting.push(answer),
        }
    };
    assert_eq!(refused.kind, ErrorKind::Busy);
    assert!((MOST_WAITING..=MOST_WAITING + 1).contains(&waiting.len()));
    bench.guest.set(false);
    for answer in waiting {
        let error = answer.recv_timeout(LONG).unwrap().unwrap_err();
        assert_eq!(error.kind, ErrorKind::Conflict);
    }
}
