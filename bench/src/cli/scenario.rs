//! What `compare` can ask of servers.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::error::{Failure, Result};

/// A group of rows that answer one question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum CompareScenario {
    /// What serving costs, from few connections to many.
    Echo,
    /// The same with payloads of 64 B to 64 KiB.
    Sizes,
    /// Messages of 64 KiB to 1 MiB.
    Stream,
    /// Many requests at a time on few connections, served side by side and answered in any order.
    Mux,
    /// Bytes forwarded to another server and back.
    Proxy,
    /// What RPC frameworks serve, gRPC and Thrift.
    Rpc,
    /// What silent connections cost.
    Idle,
    /// Latency in open loops, at shares of what the slowest server takes.
    Rates,
    /// What becomes of cheap requests and of throughput where requests compute.
    Heavy,
    /// What HTTP servers serve: axum and tonic.
    Http,
    /// What calls cost an RPC client: the client is measured, and not the server.
    Calls,
}

impl CompareScenario {
    const ALL: [(&'static str, CompareScenario); 11] = [
        ("echo", CompareScenario::Echo),
        ("sizes", CompareScenario::Sizes),
        ("stream", CompareScenario::Stream),
        ("mux", CompareScenario::Mux),
        ("proxy", CompareScenario::Proxy),
        ("rpc", CompareScenario::Rpc),
        ("idle", CompareScenario::Idle),
        ("rates", CompareScenario::Rates),
        ("heavy", CompareScenario::Heavy),
        ("http", CompareScenario::Http),
        ("calls", CompareScenario::Calls),
    ];
}

impl fmt::Display for CompareScenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = Self::ALL.iter().find(|(_, scenario)| scenario == self);
        f.write_str(named.map_or("", |(name, _)| name))
    }
}

/// Scenarios by name, separated by commas, each once; `all` for all of them.
#[derive(Clone, Debug)]
pub(crate) struct ScenarioList(pub(crate) Vec<CompareScenario>);

impl FromStr for ScenarioList {
    type Err = Failure;

    fn from_str(text: &str) -> Result<ScenarioList> {
        let mut list = Vec::new();
        for name in text.split(',') {
            let all =
                CompareScenario::ALL.iter().filter(|(known, _)| *known == name || name == "all");
            let found: Vec<_> = all.map(|(_, scenario)| *scenario).collect();
            if found.is_empty() {
                let known = CompareScenario::ALL.map(|(name, _)| name).join(", ");
                return Err(Failure::new(format!(
                    "unknown scenario {name:?}: choose of {known}, or all"
                )));
            }
            list.extend(
                found.into_iter().filter(|scenario| !list.contains(scenario)).collect::<Vec<_>>(),
            );
        }
        Ok(ScenarioList(list))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenarios_are_named_once_or_all_together() {
        let list = |text: &str| text.parse::<ScenarioList>().map(|list| list.0);
        let (echo, heavy) = (CompareScenario::Echo, CompareScenario::Heavy);
        assert_eq!(list("heavy,echo,heavy").unwrap(), [heavy, echo]);
        assert_eq!(list("all").unwrap().len(), CompareScenario::ALL.len());
        for wrong in ["", "echo,", "hevy"] {
            assert!(list(wrong).is_err(), "{wrong:?}");
        }
        for (name, scenario) in CompareScenario::ALL {
            assert_eq!(scenario.to_string(), name);
        }
    }
}
