//! What lies between the client and its servers.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::error::Result;
use crate::host::namespaces::{Namespaces, SERVER_IP};

#[derive(Clone, Debug, Default)]
pub(crate) enum Network {
    /// Nothing: both are on this host.
    #[default]
    Loopback,
    /// Both are on this host, each with a network stack of its own.
    Veth(Arc<Namespaces>),
    /// The servers were started by somebody, on another host.
    Elsewhere,
}

impl Network {
    /// Where a server listens that is started for a measurement.
    pub(crate) fn server_ip(&self) -> IpAddr {
        match self {
            Network::Loopback | Network::Elsewhere => Ipv4Addr::LOCALHOST.into(),
            Network::Veth(_) => SERVER_IP,
        }
    }

    /// Does something where such a server runs: starts it.
    pub(crate) fn among_servers<T>(&self, act: impl FnOnce() -> T) -> Result<T> {
        match self {
            Network::Loopback | Network::Elsewhere => Ok(act()),
            Network::Veth(namespaces) => namespaces.among_servers(act),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Network::Loopback => "loopback",
            Network::Veth(_) => "veth",
            Network::Elsewhere => "elsewhere",
        }
    }
}

impl Serialize for Network {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
