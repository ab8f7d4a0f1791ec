//! A browser without a window, Debian's Chromium as `tests/setup` has unpacked it, driven by its debugging protocol over a pipe.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::places;

/// How long a page may take for what is waited for, in milliseconds.
const LIMIT: u32 = 60_000;

/// A browser with one page.
pub struct Browser {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
    asked: u64,
    session: Option<String>,
    /// What the browser has told of, besides answers.
    told: Vec<Value>,
}

/// Where it has been unpacked.
#[must_use]
pub fn package() -> PathBuf {
    places::testbed().join("browser")
}

impl Browser {
    /// Starts it, with a profile of its own in `directory`, where its log is too.
    ///
    /// # Errors
    ///
    /// When it is not there, or does not run here.
    pub fn start(directory: &Path) -> Result<Self> {
        let root = package();
        let program = root.join("usr/lib/chromium/chromium-headless-shell");
        if !program.is_file() {
            bail!("there is no {}: run make setup", program.display());
        }
        let fonts = directory.join("fonts.conf");
        let dirs = [root.join("usr/share/fonts"), "/usr/share/fonts".into()];
        let dirs = dirs.map(|dir: PathBuf| format!("<dir>{}</dir>", dir.display()));
        let cache = format!("<cachedir>{}</cachedir>", directory.join("fonts").display());
        let text = format!("<fontconfig>{}{cache}</fontconfig>", dirs.concat());
        fs::write(&fonts, text)?;
        // One of its libraries keeps a part of itself in a directory of its own.
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        let libraries = format!("{0}:{0}/pulseaudio", libraries.display());
        // It reads commands at descriptor 3 and answers at 4.
        let mut command = Command::new("sh");
        command
            .args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null", "sh"])
            .arg(&program)
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--remote-debugging-pipe",
            ])
            .args([
                "--disable-dev-shm-usage",
                "--no-proxy-server",
                "--disable-background-networking",
            ])
            .args(["--hide-scrollbars", "--force-device-scale-factor=1"])
            .arg(format!(
                "--user-data-dir={}",
                directory.join("profile").display()
            ))
            .env("HOME", directory)
            .env("FONTCONFIG_FILE", &fonts)
            .env("LD_LIBRARY_PATH", libraries)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(directory.join("browser.log"))?);
        let mut child = command.spawn().context("the browser cannot be started")?;
        let to = child.stdin.take();
        let from = child.stdout.take().context("no pipe from the browser")?;
        let mut browser = Self {
            child,
            to,
            from: BufReader::new(from),
            asked: 0,
            session: None,
            told: Vec::new(),
        };
        let page = browser.ask("Target.createTarget", json!({ "url": "about:blank" }))?;
        let request = json!({ "targetId": page["targetId"], "flatten": true });
        let attached = browser.ask("Target.attachToTarget", request)?;
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.ask(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(browser)
    }

    /// Asks the browser for something of its protocol, and returns the result.
    ///
    /// # Errors
    ///
    /// When it refuses, or has gone.
    pub fn ask(&mut self, method: &str, parameters: Value) -> Result<Value> {
        self.asked += 1;
        let mut request = json!({ "id": self.asked, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            request["sessionId"] = session.as_str().into();
        }
        let mut bytes = serde_json::to_vec(&request)?;
        bytes.push(0);
        let to = self.to.as_mut().context("the browser has been closed")?;
        to.write_all(&bytes)?;
        to.flush()?;
        loop {
            let mut answer = Vec::new();
            self.from.read_until(0, &mut answer)?;
            if answer.pop() != Some(0) {
                bail!("the browser has gone, asked for {method}");
            }
            let answer: Value = serde_json::from_slice(&answer)?;
            if answer["id"] != self.asked {
                self.told.push(answer);
            } else if answer["error"].is_null() {
                return Ok(answer["result"].clone());
            } else {
                bail!("{method}: {}", answer["error"]);
            }
        }
    }

    /// The value of an expression in the page; of a promise what it comes to.
    ///
    /// # Errors
    ///
    /// When it throws.
    pub fn value(&mut self, expression: &str) -> Result<Value> {
        let request =
            json!({ "expression": expression, "awaitPromise": true, "returnByValue": true });
        let result = self.ask("Runtime.evaluate", request)?;
        if !result["exceptionDetails"].is_null() {
            bail!("{expression}: {}", result["exceptionDetails"]);
        }
        Ok(result["result"]["value"].clone())
    }

    /// Waits until an expression is true in the page.
    ///
    /// # Errors
    ///
    /// When that takes too long; what the page shows is told.
    pub fn until(&mut self, expression: &str) -> Result<()> {
        let waiting = format!(
            "new Promise((done) => {{ const end = Date.now() + {LIMIT}; const look = () => {{ let is = false; \
             try {{ is = {expression}; }} catch {{ }} \
             if (is || Date.now() > end) done(Boolean(is)); else setTimeout(look, 20); }}; look(); }})"
        );
        if self.value(&waiting)? == true {
            return Ok(());
        }
        let shown = self.value("document.body.innerText")?;
        bail!(
            "{expression} did not come true; the page shows {shown}; told: {:?}",
            self.faults()
        )
    }

    /// Opens an address, and waits for the page.
    ///
    /// # Errors
    ///
    /// When it cannot be opened.
    pub fn open(&mut self, address: &str) -> Result<()> {
        let opened = self.ask("Page.navigate", json!({ "url": address }))?;
        if let Some(error) = opened["errorText"].as_str() {
            bail!("{address}: {error}");
        }
        self.until("document.readyState === 'complete'")
    }

    /// Presses a key and lets it go: its name, the name of its place, and what it types.
    ///
    /// # Errors
    ///
    /// When the browser has gone.
    pub fn key(&mut self, key: &str, code: &str) -> Result<()> {
        for kind in ["keyDown", "keyUp"] {
            let mut event = json!({ "type": kind, "key": key, "code": code });
            if kind == "keyDown" && key.chars().count() == 1 {
                event["text"] = key.into();
            }
            self.ask("Input.dispatchKeyEvent", event)?;
        }
        Ok(())
    }

    /// Has the window be of another size, in pixels, as on a phone or not.
    ///
    /// # Errors
    ///
    /// When the browser has gone.
    pub fn resize(&mut self, width: u32, height: u32, phone: bool) -> Result<()> {
        let request =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone });
        self.ask("Emulation.setDeviceMetricsOverride", request)?;
        Ok(())
    }

    /// Writes what the window shows into a PNG file.
    ///
    /// # Errors
    ///
    /// When that cannot be written.
    pub fn picture(&mut self, path: &Path) -> Result<()> {
        let picture = self.ask("Page.captureScreenshot", json!({ "format": "png" }))?;
        let text = picture["data"].as_str().context("no picture")?;
        fs::write(path, from_base64(text)?)?;
        Ok(())
    }

    /// Addresses that pages have asked for.
    #[must_use]
    pub fn requests(&self) -> Vec<&str> {
        let told = self.told.iter();
        let requests = told.filter_map(|told| match told["method"].as_str()? {
            "Network.requestWillBeSent" => told["params"]["request"]["url"].as_str(),
            "Network.webSocketCreated" => told["params"]["url"].as_str(),
            _ => None,
        });
        requests.collect()
    }

    /// What pages have done wrong, or their policies have kept them from.
    #[must_use]
    pub fn faults(&self) -> Vec<&Value> {
        let is_fault = |told: &&Value| match told["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Log.entryAdded") => told["params"]["entry"]["level"] == "error",
            Some("Runtime.consoleAPICalled") => told["params"]["type"] == "error",
            _ => false,
        };
        self.told.iter().filter(is_fault).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Without its pipe it ends, with all its processes.
        self.to = None;
        let mut rest = Vec::new();
        let ended = self.from.read_until(0, &mut rest);
        while ended.is_ok()
            && self
                .from
                .read_until(0, &mut rest)
                .is_ok_and(|count| count > 0)
        {
            rest.clear();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// RFC 4648, section 4.
fn from_base64(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for digit in text.bytes().filter(|byte| *byte != b'=') {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => bail!("no base64: {digit}"),
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.extend((bits >> count).to_le_bytes().first());
            bits &= (1 << count) - 1;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_decoded() {
        for (text, bytes) in [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm9vYg==", "foob"),
        ] {
            assert_eq!(from_base64(text).unwrap(), bytes.as_bytes());
        }
        assert!(from_base64("a b").is_err());
    }
}
