//! The web console in a browser: what the guest draws and writes is seen there, and what is typed there reaches it.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::browser::Browser;
use tests::control::Connection;
use tests::{kit, places, probe, suite};

const CLASS: &str = "web-console";
/// Everything here takes a second or two.
const LIMIT: Duration = Duration::from_secs(60);

/// A guest that draws, and takes letters on its serial port.
struct Machine {
    directory: tempfile::TempDir,
    child: Child,
    /// Where its page is; no other process has this address.
    site: String,
}

impl Machine {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let [_, a, b, c] = std::process::id().to_be_bytes();
        let place = format!("127.{a}.{b}.{}:8006", c.max(1));
        let child = Command::new(kit::vireo().unwrap())
            .args(["run", "--serial", "null", "--display"])
            .arg(format!("width=640,height=480,web={place}"))
            .arg("--kernel")
            .arg(kit::file("guests/screen").unwrap())
            .args(["--name", "painter", "--api-socket", "socket"])
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(directory.path().join("errors")).unwrap())
            .spawn()
            .unwrap();
        Self {
            directory,
            child,
            site: format!("http://{place}/"),
        }
    }

    /// The address that lets a browser in, once.
    fn address(&self) -> String {
        let socket = self.directory.path().join("socket");
        let end = Instant::now() + LIMIT;
        loop {
            // The socket is there before the machine is.
            let mut connection = Connection::open_within(&socket, LIMIT).unwrap();
            let answer = connection.ask("GET vm.info", "").unwrap();
            let info: Value = serde_json::from_str(&answer.text()).unwrap_or_default();
            if let Some(url) = info["web_console"]["url"].as_str() {
                return url.to_owned();
            }
            assert!(Instant::now() < end, "{info}: {}", self.errors());
        }
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.directory.path().join("errors")).unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It has ended by itself when all went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the terminal shows, without its blanks, as an expression.
const SERIAL: &str =
    "document.querySelector('#serial .xterm-rows').textContent.replace(/\\s+/g, '')";
const CONNECTED: &str =
    "document.body.dataset.screen === 'connected' && document.body.dataset.serial === 'connected'";

/// Keeps what pages say to the serial console in `said`.
const LISTENS: &str = "window.said = ''; const send = WebSocket.prototype.send; \
    WebSocket.prototype.send = function (data) { \
    if (this.url.endsWith('/serial')) said += String.fromCharCode(...data); return send.call(this, data); };";

/// That a pixel of the screen is about of this colour, as an expression.
fn pixel(x: u32, y: u32, [red, green, blue]: [u32; 3]) -> String {
    format!(
        "(() => {{ const c = document.querySelector('#screen canvas'); \
         const p = c.getContext('2d').getImageData({x}, {y}, 1, 1).data; \
         return c.width === 640 && c.height === 480 && \
         [{red}, {green}, {blue}].every((v, i) => Math.abs(v - p[i]) < 40); }})()"
    )
}

fn shows(text: &str) -> String {
    format!("{SERIAL}.includes({text:?})")
}

fn drives_the_guest(browser: &mut Browser, machine: &Machine) {
    let address = machine.address();
    browser.resize(1280, 760, false).unwrap();
    browser.open(&address).unwrap();
    browser.until(CONNECTED).unwrap();
    assert_eq!(
        browser.value("location.href").unwrap(),
        machine.site.as_str()
    );
    assert_ne!(machine.address(), address, "a token is used once");
    // What the guest wrote before is there, and what it has drawn.
    browser.until(&shows("drawnseed=0640x480")).unwrap();
    browser.until(&pixel(100, 50, [100, 150, 86])).unwrap();
    assert_eq!(
        browser.value("document.title").unwrap(),
        "painter – console"
    );

    // Typed in the terminal, seen on the screen.
    browser
        .value("document.querySelector('#serial textarea').focus()")
        .unwrap();
    browser.key("t", "KeyT").unwrap();
    browser.until(&shows("touched")).unwrap();
    browser.until(&pixel(8, 8, [255, 255, 255])).unwrap();
    // What the guest asks of the terminal is answered.
    browser.key("p", "KeyP").unwrap();
    browser.until("/^tp\\x1b\\[[0-9;]+R$/.test(said)").unwrap();
    // Typed at the screen, seen in the terminal.
    browser
        .value("document.querySelector('#screen canvas').focus()")
        .unwrap();
    browser.key("a", "KeyA").unwrap();
    browser.until(&shows("key=1ekey=9e")).unwrap();
    browser
        .value("document.querySelector('#reset').click()")
        .unwrap();
    browser
        .until(&shows("key=1dkey=38key=e0key=53key=e0key=d3key=b8key=9d"))
        .unwrap();
    // A text, key by key.
    browser
        .value("document.querySelector('#paste').click()")
        .unwrap();
    browser
        .until("document.querySelector('#clipboard').open")
        .unwrap();
    browser
        .value(
            "document.querySelector('#clipboard [value=screen]').checked = true; \
             document.querySelector('#text').value = 'B\\n'; \
             document.querySelector('#clipboard [value=type]').click()",
        )
        .unwrap();
    browser
        .until(&shows("key=2akey=30key=aakey=b0key=1ckey=9c"))
        .unwrap();
}

fn fills_the_display(browser: &mut Browser) {
    // Browsers do so for their users alone.
    let click =
        json!({ "expression": "document.querySelector('#full').click()", "userGesture": true });
    for (is, element) in [(true, "document.documentElement"), (false, "null")] {
        browser.ask("Runtime.evaluate", click.clone()).unwrap();
        let told = format!("document.querySelector('#full').ariaPressed === '{is}'");
        let fills = format!("{told} && document.fullscreenElement === {element}");
        browser.until(&fills).unwrap();
    }
}

/// The page finds another process at the same place, and asks who is there.
fn comes_back(browser: &mut Browser) {
    let again = Machine::start();
    let address = again.address();
    let (_, token) = address.split_once("#token=").unwrap();
    browser
        .until("document.querySelector('#entry').open")
        .unwrap();
    browser
        .value(&format!(
            "document.querySelector('#token').value = '{token}'; \
             document.querySelector('#entry button').click()"
        ))
        .unwrap();
    browser.until(CONNECTED).unwrap();
    browser
        .value("document.querySelector('#serial textarea').focus()")
        .unwrap();
    browser.key("t", "KeyT").unwrap();
    browser.until(&shows("touched")).unwrap();
}

fn fits_a_phone(browser: &mut Browser, pictures: &Path) {
    browser.picture(&pictures.join("console.png")).unwrap();
    browser.resize(390, 740, true).unwrap();
    browser
        .until("document.body.dataset.view === 'screen'")
        .unwrap();
    let fits = "document.documentElement.scrollWidth <= innerWidth && \
                document.querySelector('#screen canvas').getBoundingClientRect().width <= innerWidth";
    browser.until(fits).unwrap();
    browser.picture(&pictures.join("phone.png")).unwrap();
    // The phone's own keyboard, which enters letters and presses no keys.
    browser
        .value("document.querySelector('#keyboard').click()")
        .unwrap();
    browser
        .until("document.activeElement.id === 'typed'")
        .unwrap();
    browser
        .ask("Input.insertText", json!({ "text": "c" }))
        .unwrap();
    browser
        .value("document.querySelector('#views [value=serial]').click()")
        .unwrap();
    browser
        .until("document.querySelector('#serial').getBoundingClientRect().width === innerWidth")
        .unwrap();
    browser.until(&shows("key=2ekey=ae")).unwrap();
    browser.picture(&pictures.join("phone-serial.png")).unwrap();
    let unnamed = "[...document.querySelectorAll('button, input, textarea, section')].filter((e) => \
                   !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map((e) => e.outerHTML)";
    assert_eq!(browser.value(unnamed).unwrap(), Value::Array(Vec::new()));
}

#[test]
fn a_browser_shows_the_guest_and_types_into_it() {
    if let Err(error) = probe::open_kvm() {
        println!("SKIP  {CLASS}: cannot open /dev/kvm: {error}");
        return suite::note(CLASS, &format!("skipped: {error}")).unwrap();
    }
    let pictures = places::testbed().join(CLASS);
    fs::create_dir_all(&pictures).unwrap();
    let profile = tempfile::tempdir().unwrap();
    let mut browser = match Browser::start(profile.path()) {
        Ok(browser) => browser,
        Err(error) => {
            println!("SKIP  {CLASS}: {error:#}");
            return suite::note(CLASS, &format!("skipped: {error:#}")).unwrap();
        }
    };
    let listens = json!({ "source": LISTENS });
    browser
        .ask("Page.addScriptToEvaluateOnNewDocument", listens)
        .unwrap();
    let mut machine = Machine::start();
    drives_the_guest(&mut browser, &machine);
    fills_the_display(&mut browser);
    fits_a_phone(&mut browser, &pictures);

    // Who comes again is known, and the machine's output is there again.
    browser.open(&machine.site).unwrap();
    browser.until(CONNECTED).unwrap();
    browser
        .value("document.querySelector('#views [value=serial]').click()")
        .unwrap();
    browser.until(&shows("drawnseed=0640x480")).unwrap();
    // Nor is what the guest asked before answered once more.
    browser.until(&shows("asked")).unwrap();
    assert_eq!(browser.value("said").unwrap(), "");
    assert_eq!(browser.faults(), Vec::<&Value>::new());
    let host = machine.site.trim_start_matches("http:").to_owned();
    for asked in browser.requests() {
        let own = ["http:", "ws:"]
            .iter()
            .any(|s| asked.starts_with(&format!("{s}{host}")));
        assert!(
            own || asked.starts_with("data:") || asked.starts_with("blob:"),
            "{asked}"
        );
    }
    // The machine's end is told.
    browser
        .value("document.querySelector('#serial textarea').focus()")
        .unwrap();
    browser.key("q", "KeyQ").unwrap();
    browser
        .until("document.querySelector('#state').textContent === 'Reconnecting'")
        .unwrap();
    let status = machine.child.wait().unwrap();
    let errors = machine.errors();
    assert!(status.success(), "{errors}");
    assert!(
        !errors.contains("token="),
        "no token is written anywhere: {errors}"
    );
    comes_back(&mut browser);
    suite::note(CLASS, "on this machine's /dev/kvm").unwrap();
}
