//! How many requests there have been, for `vm.metrics`.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::head::Target;

/// What is no endpoint of this server, or not with this method.
const OTHER: &str = "other";

/// Requests by endpoint. Those that cannot be read as HTTP do not count.
#[derive(Debug, Default)]
pub(super) struct Requests(BTreeMap<&'static str, u64>);

impl Requests {
    /// There is one more.
    pub fn count(&mut self, target: &Target) {
        let name = match target {
            Target::Route(route, _) => route.name,
            Target::Missing(_) | Target::Method(_) | Target::Nothing(..) => OTHER,
        };
        let count = self.0.entry(name).or_default();
        *count = count.saturating_add(1);
    }

    /// Adds the counts to metrics in Prometheus' text format.
    pub fn tell(&self, text: &mut String) {
        text.push_str(
            "# HELP vireo_api_requests_total requests to the control socket\n\
             # TYPE vireo_api_requests_total counter\n",
        );
        for (name, count) in &self.0 {
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "vireo_api_requests_total{{endpoint=\"{name}\"}} {count}"
            );
        }
    }
}
