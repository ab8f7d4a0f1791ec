//! Cases: a guest, the flags to start it with, and what must come of it.
//!
//! A case is data, so that it can be sent into the nested machine.

use serde::{Deserialize, Serialize};

use crate::look::Look;

/// One run of the monitor.
///
/// In `args` and scripts `{dir}` stands for the case's own directory, made for it
/// and empty but for its [`files`](Case::files).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// Unique within a suite; the log's file name comes from it.
    pub name: String,
    /// What to boot.
    pub boot: Boot,
    /// Flags of `vireo run` besides the kernel, initramfs and command line.
    pub args: Vec<String>,
    /// Files to make first.
    pub files: Vec<ScratchFile>,
    /// A shell script to run first, in the case's directory; it must succeed.
    pub before: String,
    /// What to do while the guest runs, in order.
    pub steps: Vec<Step>,
    /// The monitor's exit code; a signal N counts as 128 + N.
    pub exit: i32,
    /// What the output must and must not hold. The output is the monitor's standard output and
    /// then the `after` script's.
    pub wants: Vec<Want>,
    /// A shell script to run afterwards, in the case's directory; it must succeed.
    pub after: String,
    /// Seconds from start to exit.
    pub limit: u64,
    /// The case changes settings of the machine it runs on: never direct.
    pub nested_only: bool,
    /// The monitor is started as `vireo serve` with [`args`](Case::args), without a machine;
    /// the steps create one over the control socket.
    pub served: bool,
    /// The Linux guest has QEMU's guest agent as `/bin/qemu-ga`, and `/bin/vsock`.
    pub guest_agent: bool,
    /// The Linux guest, which has the nested machine's kernel, and that machine have `iperf3`, `passt`, `tcpdump` and `tc`, and
    /// a script `/modules/net` that loads what networks need.
    pub net_tools: bool,
    /// That machine alone has them, and the guest has whichever kernel.
    pub net_host: bool,
    /// The nested machine has `virtiofsd`.
    pub virtiofsd: bool,
}

/// What a case boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Boot {
    /// A Linux kernel with the testbed's initramfs and serial console.
    Linux {
        /// Which kernel, such as `6.12-cloud`.
        kernel: String,
        /// In which form.
        form: Form,
        /// More words for its command line.
        cmdline: String,
        /// The shell script that the guest runs; it powers off at the end.
        script: String,
    },
    /// One of the small guests of `resources/guests`.
    Guest {
        /// Its name.
        name: String,
        /// The words that tell it what to do.
        cmdline: String,
    },
}

impl Boot {
    /// The small guest `name` with its command line.
    #[must_use]
    pub fn guest(name: &str, cmdline: &str) -> Self {
        Self::Guest {
            name: name.to_owned(),
            cmdline: cmdline.to_owned(),
        }
    }

    /// A Linux guest that runs `script`.
    #[must_use]
    pub fn linux(kernel: &str, form: Form, script: &str) -> Self {
        Self::Linux {
            kernel: kernel.to_owned(),
            form,
            cmdline: String::new(),
            script: script.to_owned(),
        }
    }
}

/// The form in which a kernel is handed to the monitor, and its entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Form {
    /// The package's bzImage, 64-bit boot protocol.
    BzImage,
    /// The ELF inside, by PVH.
    Pvh,
    /// The ELF inside, by its 64-bit entry.
    Elf64,
}

impl Form {
    /// A word for names of cases.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::BzImage => "bzimage",
            Self::Pvh => "pvh",
            Self::Elf64 => "elf64",
        }
    }
}

/// A file that a case starts with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScratchFile {
    /// Its name in the case's directory.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
    /// What it is filled with.
    pub fill: Fill,
}

/// The content of a [`ScratchFile`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fill {
    /// A hole.
    Zero,
    /// The same reproducible noise each time.
    Noise,
}

/// Waits for a text in the output, then acts. A case whose guest ends before fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The text to wait for; earlier steps' texts come before it. Empty is at once.
    pub when: String,
    /// What to do then.
    pub then: Action,
}

/// What a [`Step`] does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Sends the monitor a signal by name, such as `TERM`.
    Signal(String),
    /// Writes to the monitor's standard input.
    Type(String),
    /// Sends a request to the control socket of a case that is [`served`](Case::served).
    Ask(Ask),
    /// Sends a request with a new queue of the tap that its body names as `tap`.
    Pass(Ask),
    /// Runs a shell script as `after` is run; what it prints goes behind the guest's output. `{kernel}`, `{initramfs}` and
    /// `{cmdline}` are as in an [`Ask`].
    Run(String),
    /// Connects to a unix socket in the case's directory, writes, and waits for a text.
    Talk(Talk),
    /// Looks at the screen.
    Look(Look),
    /// Looks whether the output stands still: the guest writes all the time, but now it
    /// must be silent for so many milliseconds.
    Still(u64),
    /// Waits until the monitor has ended with 0, and starts another with these arguments, whose braces are as in an [`Ask`]:
    /// what follows is that one's, and its output goes on behind the first one's.
    Succeed(Vec<String>),
}

/// What is said over a socket, and what must be heard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Talk {
    /// The socket's name in the case's directory.
    pub socket: String,
    /// What is written.
    pub say: String,
    /// What must come, after whatever else.
    pub hear: String,
}

/// A request and what must be answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// Method and endpoint, such as `PUT vm.pause`.
    pub request: String,
    /// What is sent with it. Besides `{dir}`, the words `{kernel}`, `{initramfs}` and
    /// `{cmdline}` stand for what the case boots.
    pub body: String,
    /// The status of the answer.
    pub status: u16,
    /// What the answer's body must and must not hold.
    pub wants: Vec<Want>,
    /// It is asked again until the answer is as wanted.
    pub again: bool,
}

impl Ask {
    /// A request to which 204 is answered.
    #[must_use]
    pub fn put(endpoint: &str, body: &str) -> Self {
        Self {
            request: format!("PUT {endpoint}"),
            body: body.to_owned(),
            status: 204,
            wants: Vec::new(),
            again: false,
        }
    }

    /// A request whose answer has these texts.
    #[must_use]
    pub fn get(endpoint: &str, texts: &[&str]) -> Self {
        let texts = texts.iter().map(|text| Want::Text((*text).to_owned()));
        Self {
            request: format!("GET {endpoint}"),
            body: String::new(),
            status: 200,
            wants: texts.collect(),
            again: false,
        }
    }

    /// Asks until the answer is as wanted.
    #[must_use]
    pub fn until(mut self) -> Self {
        self.again = true;
        self
    }

    /// Sets the status to expect.
    #[must_use]
    pub fn answered(mut self, status: u16) -> Self {
        self.status = status;
        self
    }

    /// Adds one demand on the answer's body.
    #[must_use]
    pub fn want(mut self, want: Want) -> Self {
        self.wants.push(want);
        self
    }

    /// Says what is wrong with an answer, if anything.
    #[must_use]
    pub fn complaint(&self, status: u16, body: &str) -> Option<String> {
        let wrong = if status == self.status {
            self.wants.iter().find_map(|want| want.complaint(body, ""))
        } else {
            Some(format!("{status}, not {}", self.status))
        };
        wrong.map(|wrong| format!("{} was answered {wrong}: {body}", self.request))
    }
}

/// One demand on the output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Want {
    /// This whole line, white space at its ends aside.
    Line(String),
    /// This text somewhere.
    Text(String),
    /// This text nowhere.
    NoText(String),
    /// This text exactly so many times.
    Times(String, usize),
    /// The whole number that follows this text is from the first to the second.
    Between(String, u64, u64),
    /// This text among the monitor's messages, on its standard error.
    Message(String),
}

impl Want {
    /// Says what is wrong with `output` or the monitor's `messages`, if anything.
    #[must_use]
    pub fn complaint(&self, output: &str, messages: &str) -> Option<String> {
        match self {
            Self::Line(line) => (!output.lines().any(|found| found.trim() == line))
                .then(|| format!("no line \"{line}\"")),
            Self::Text(text) => (!output.contains(text)).then(|| format!("no \"{text}\"")),
            Self::Message(text) => {
                (!messages.contains(text)).then(|| format!("no message \"{text}\""))
            }
            Self::NoText(text) => output
                .lines()
                .find(|line| line.contains(text))
                .map(|line| format!("unwanted \"{text}\" in \"{}\"", line.trim())),
            Self::Times(text, count) => {
                let found = output.matches(text.as_str()).count();
                (found != *count).then(|| format!("\"{text}\" {found} times, not {count}"))
            }
            Self::Between(text, least, most) => match number_after(output, text) {
                Some(number) if (*least..=*most).contains(&number) => None,
                Some(number) => Some(format!("\"{text}\" {number}, not {least} to {most}")),
                None => Some(format!("no number after \"{text}\"")),
            },
        }
    }
}

/// The number that begins right behind the first `text` in `output`.
fn number_after(output: &str, text: &str) -> Option<u64> {
    let (_, rest) = output.split_once(text)?;
    let end = rest.find(|c: char| !c.is_ascii_digit());
    rest.get(..end.unwrap_or(rest.len()))?.parse().ok()
}

impl Case {
    /// A case that boots `boot` and must exit with 0; fields are set from there.
    #[must_use]
    pub fn new(name: impl Into<String>, boot: Boot) -> Self {
        Self {
            name: name.into(),
            boot,
            args: Vec::new(),
            files: Vec::new(),
            before: String::new(),
            steps: Vec::new(),
            exit: 0,
            wants: Vec::new(),
            after: String::new(),
            limit: 60,
            nested_only: false,
            served: false,
            guest_agent: false,
            net_tools: false,
            net_host: false,
            virtiofsd: false,
        }
    }

    /// Adds flags, split at blanks.
    #[must_use]
    pub fn args(mut self, args: &str) -> Self {
        self.args.extend(args.split_whitespace().map(str::to_owned));
        self
    }

    /// Adds a file to start with.
    #[must_use]
    pub fn file(mut self, name: &str, size: u64, fill: Fill) -> Self {
        self.files.push(ScratchFile {
            name: name.to_owned(),
            size,
            fill,
        });
        self
    }

    /// Demands these whole lines.
    #[must_use]
    pub fn lines<I: IntoIterator<Item: Into<String>>>(mut self, lines: I) -> Self {
        self.wants
            .extend(lines.into_iter().map(|line| Want::Line(line.into())));
        self
    }

    /// Adds one demand.
    #[must_use]
    pub fn want(mut self, want: Want) -> Self {
        self.wants.push(want);
        self
    }

    /// Sets the exit code to expect.
    #[must_use]
    pub fn exits(mut self, code: i32) -> Self {
        self.exit = code;
        self
    }

    /// Adds a step.
    #[must_use]
    pub fn step(mut self, when: &str, then: Action) -> Self {
        self.steps.push(Step {
            when: when.to_owned(),
            then,
        });
        self
    }

    /// Lets the steps make the machine, over the control socket.
    #[must_use]
    pub fn served(mut self) -> Self {
        self.served = true;
        self
    }

    /// Adds requests, one after the other from when the text has come.
    #[must_use]
    pub fn asks<I: IntoIterator<Item = Ask>>(self, when: &str, asks: I) -> Self {
        let mut when = when;
        asks.into_iter().fold(self, |case, ask| {
            case.step(std::mem::take(&mut when), Action::Ask(ask))
        })
    }

    /// Sets the script to run before.
    #[must_use]
    pub fn before(mut self, script: &str) -> Self {
        script.clone_into(&mut self.before);
        self
    }

    /// Sets the script to run after.
    #[must_use]
    pub fn after(mut self, script: &str) -> Self {
        script.clone_into(&mut self.after);
        self
    }

    /// Sets the time limit in seconds.
    #[must_use]
    pub fn limit(mut self, seconds: u64) -> Self {
        self.limit = seconds;
        self
    }
}

/// What came of a case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// The case's name.
    pub name: String,
    /// How it went.
    pub verdict: Verdict,
    /// Milliseconds from start to exit, by the clock of the ground it ran on.
    pub millis: u64,
    /// Standard output of monitor and `after` script, the start cut off when it is long.
    pub output: String,
    /// Standard error of the monitor, likewise.
    pub errors: String,
}

/// How a case went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// As it should.
    Pass,
    /// Each broken demand.
    Fail(Vec<String>),
    /// It did not end in time; on nested ground the emulator may be to blame.
    Hung(String),
    /// Each broken demand, after the guest's processor shut down unasked (a triple
    /// fault); on nested ground the emulator may be to blame.
    ShutDown(Vec<String>),
}

/// What the agent in the nested machine sends, one JSON value per line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The machine is up; what is wrong with its KVM, if anything.
    Ready(Result<(), String>),
    /// A case begins.
    Begin(String),
    /// A case ended.
    End(Box<Outcome>),
    /// All cases are done.
    Done,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wants_complain_about_what_they_miss_and_nothing_else() {
        let output = "[ 0.1] x\r\n@@ nproc=2\r\n@@ boot\n@@ boot\n";
        assert_eq!(
            Want::Line("@@ nproc=2".into()).complaint(output, "note"),
            None
        );
        assert!(
            Want::Line("@@ nproc".into())
                .complaint(output, "note")
                .is_some()
        );
        assert_eq!(Want::Text("nproc".into()).complaint(output, "note"), None);
        assert!(
            Want::Text("@@ up".into())
                .complaint(output, "note")
                .is_some()
        );
        assert_eq!(Want::Message("not".into()).complaint(output, "note"), None);
        assert!(
            Want::Message("cpu".into())
                .complaint(output, "note")
                .is_some()
        );
        assert!(
            Want::NoText("boot".into())
                .complaint(output, "note")
                .is_some()
        );
        assert_eq!(
            Want::Times("@@ boot".into(), 2).complaint(output, "note"),
            None
        );
        assert!(
            Want::Times("@@ boot".into(), 1)
                .complaint(output, "note")
                .is_some()
        );
    }

    #[test]
    fn a_number_is_looked_at_where_it_begins_behind_the_text() {
        let between = |text: &str, least, most| {
            Want::Between(text.to_owned(), least, most).complaint("a 7\nab 12", "")
        };
        assert_eq!(between("a ", 7, 7), None);
        assert_eq!(between("ab ", 0, 12), None);
        for (text, least, most) in [("a ", 8, 9), ("a ", 0, 6), ("ab", 0, 99), ("c", 0, 99)] {
            assert!(between(text, least, most).is_some(), "{text}");
        }
    }

    #[test]
    fn an_answer_is_measured_by_its_status_and_then_by_its_body() {
        let ask = Ask::get("vm.info", &["Paused"]).want(Want::NoText("disk9".into()));
        assert_eq!(ask.complaint(200, r#"{"state":"Paused"}"#), None);
        assert!(
            ask.complaint(404, "Paused")
                .unwrap()
                .contains("404, not 200")
        );
        assert!(ask.complaint(200, "Running").unwrap().contains("vm.info"));
        assert!(ask.complaint(200, "Paused disk9").is_some());
    }

    #[test]
    fn only_the_first_of_several_requests_waits_for_the_text() {
        let case = Case::new("x", Boot::guest("hello", ""))
            .asks("up", [Ask::put("vm.pause", ""), Ask::put("vm.resume", "")]);
        let whens: Vec<&str> = case.steps.iter().map(|step| step.when.as_str()).collect();
        assert_eq!(whens, ["up", ""]);
    }

    #[test]
    fn a_case_survives_the_way_into_the_nested_machine() {
        let case = Case::new("x", Boot::guest("hello", "stay"))
            .args("--cpus boot=2")
            .file("disk", 512, Fill::Noise)
            .step("up", Action::Signal("TERM".into()))
            .served()
            .asks(
                "on",
                [
                    Ask::put("vm.pause", ""),
                    Ask::get("vm.info", &["Paused"]).until(),
                ],
            )
            .step("", Action::Still(300))
            .exits(3);
        let text = serde_json::to_string(&case).unwrap();
        assert_eq!(serde_json::from_str::<Case>(&text).unwrap(), case);
    }
}
