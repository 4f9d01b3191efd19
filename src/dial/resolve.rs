//! From the name of a host to the addresses that a dial tries, in their order.
//!
//! The code runs on the thread that polls the dial. The system's resolver blocks, so it runs on the
//! threads of `unblock`. A [`Resolve`] is code of the user: a panic of it becomes an error.

use std::fmt;
use std::future::Future;
use std::io;
use std::iter;
use std::net::{SocketAddr, ToSocketAddrs};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::address::{self, Address, PeerAddr};
use crate::config;
use crate::error::{Error, Result};
use crate::{task, user_code};

/// Finds the socket addresses of a host, for [`Dialer::resolver`](crate::Dialer::resolver).
///
/// A dial asks for every host that is neither an IP address nor empty. An IPv6 address with a zone,
/// such as `fe80::1%eth0`, is resolved by the system. The dial connects to the returned addresses
/// as they are, so a resolver may choose another port.
///
/// # Examples
/// ```
/// use std::future::{Future, ready};
/// use std::io;
/// use std::net::SocketAddr;
/// use std::pin::Pin;
///
/// use ringpoll::{Dialer, Resolve};
///
/// /// Every name is an address of this host.
/// struct Loopback;
///
/// impl Resolve for Loopback {
///     fn resolve(
///         &self,
///         _host: &str,
///         port: u16,
///     ) -> Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>> {
///         Box::pin(ready(Ok(vec![SocketAddr::from(([127, 0, 0, 1], port))])))
///     }
/// }
///
/// let dialer = Dialer::new().resolver(Loopback);
/// # drop(dialer);
/// ```
pub trait Resolve: Send + Sync + 'static {
    /// Looks up `host`. The first returned address is tried first, and its family decides which
    /// family comes first. See [`Dialer::connect`](crate::Dialer::connect) for the order of the
    /// others.
    ///
    /// The dial calls this method and polls the future on its own thread, so neither may block. The
    /// future is dropped when the dial times out or is dropped. If the future never ends, only the
    /// timeout of the dial ends the dial. A panic of either makes the dial fail with an error that
    /// [is panicked](Error::is_panicked).
    ///
    /// # Errors
    /// An error ends the dial. An answer without addresses is an error too.
    fn resolve(
        &self,
        host: &str,
        port: u16,
    ) -> Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;
}

impl<R: Resolve + ?Sized> Resolve for Arc<R> {
    fn resolve(
        &self,
        host: &str,
        port: u16,
    ) -> Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>> {
        (**self).resolve(host, port)
    }
}

/// The user's resolver.
#[derive(Clone)]
pub(super) struct Resolver(Arc<dyn Resolve>);

impl Resolver {
    pub(super) fn new(resolver: impl Resolve) -> Resolver {
        Resolver(Arc::new(resolver))
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resolver")
    }
}

/// All addresses of a host, in the order of the resolver; without a `resolver`, of the system's.
pub(super) async fn look_up(
    host: &str,
    port: u16,
    resolver: Option<&Resolver>,
) -> Result<Vec<SocketAddr>> {
    let found = match resolver {
        // A colon is a part of no name. The host is an IPv6 address with a zone, and the system
        // knows the number of the zone.
        Some(Resolver(resolver)) if !host.contains(':') => {
            let panicked = |message| {
                Error::panicked(format!("resolve {host}: the resolver panicked: {message}"))
            };
            let future = user_code::attempt("resolver", || resolver.resolve(host, port));
            Resolving { future: Some(future.map_err(panicked)?) }.await.map_err(panicked)?
        }
        _ => {
            let name = host.to_owned();
            task::look_up(move || Ok((name.as_str(), port).to_socket_addrs()?.collect())).await?
        }
    };
    let found: Vec<SocketAddr> =
        found.map_err(|error| Error::io(format_args!("resolve {host}"), error))?;
    if found.is_empty() {
        let none = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
        return Err(Error::io(format_args!("resolve {host}"), none));
    }
    Ok(found)
}

/// What the user's resolver returns.
type Answer = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// The future of a user's resolver. `Err` is the message of a panic.
struct Resolving {
    future: Option<Answer>,
}

impl Future for Resolving {
    type Output = Result<io::Result<Vec<SocketAddr>>, String>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let future = self.future.as_mut().expect("only the destructor takes the future");
        match user_code::attempt("resolver", || future.as_mut().poll(cx)) {
            Ok(polled) => polled.map(Ok),
            Err(message) => Poll::Ready(Err(message)),
        }
    }
}

impl Drop for Resolving {
    fn drop(&mut self) {
        user_code::discard(self.future.take());
    }
}

/// Which addresses a dial may use.
pub(super) struct Allowed<'a> {
    /// What the user asked for.
    pub(super) address: &'a Address,
    /// The local address. A socket that is bound to it connects within its family only.
    pub(super) local: Option<SocketAddr>,
}

impl Allowed<'_> {
    /// The addresses of `found` to try, in the order of RFC 8305, section 4: the families take
    /// turns, and within a family the order stays. At most [`config::DIAL_ADDRESSES_MAX`].
    pub(super) fn in_order(&self, found: &[SocketAddr]) -> Result<Vec<PeerAddr>> {
        self.check(found)?;
        Ok(take_turns(found.iter().copied().filter(|addr| self.allows(addr))))
    }

    /// Checks that the dial may use one of the addresses.
    pub(super) fn check(&self, found: &[SocketAddr]) -> Result<()> {
        if found.iter().any(|addr| self.allows(addr)) {
            return Ok(());
        }
        let why = match self.local {
            Some(local) if found.iter().any(|addr| self.address.family().allows(addr)) => {
                format!("no address of the family of the local address {local}")
            }
            _ => address::NO_ADDRESS_OF_FAMILY.to_owned(),
        };
        Err(Error::invalid(format!("connect {}: {why}", self.address)))
    }

    fn allows(&self, addr: &SocketAddr) -> bool {
        let fits_local = |local: SocketAddr| local.is_ipv4() == addr.is_ipv4();
        self.address.family().allows(addr) && self.local.is_none_or(fits_local)
    }
}

fn take_turns(addrs: impl Iterator<Item = SocketAddr> + Clone) -> Vec<PeerAddr> {
    let is_first_ipv4 = addrs.clone().next().is_some_and(|addr| addr.is_ipv4());
    let mut of_first = addrs.clone().filter(|addr| addr.is_ipv4() == is_first_ipv4);
    let mut of_other = addrs.filter(|addr| addr.is_ipv4() != is_first_ipv4);
    let pairs = iter::from_fn(|| match (of_first.next(), of_other.next()) {
        (None, None) => None,
        (first, other) => Some([first, other]),
    });
    pairs.flatten().flatten().take(config::DIAL_ADDRESSES_MAX).map(PeerAddr::Inet).collect()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn addr(number: u16, is_ipv4: bool) -> SocketAddr {
        match is_ipv4 {
            true => ([127, 0, 0, 1], number).into(),
            false => ([0, 0, 0, 0, 0, 0, 0, 1], number).into(),
        }
    }

    /// Distinct addresses of these families.
    fn addrs(families: &[bool]) -> Vec<SocketAddr> {
        (1..).zip(families).map(|(number, is_ipv4)| addr(number, *is_ipv4)).collect()
    }

    fn turns(found: &[SocketAddr]) -> Vec<SocketAddr> {
        let turns = take_turns(found.iter().copied());
        turns.iter().map(|peer| peer.as_inet().expect("only addresses went in")).collect()
    }

    fn of_family(addrs: &[SocketAddr], is_ipv4: bool) -> Vec<SocketAddr> {
        addrs.iter().copied().filter(|addr| addr.is_ipv4() == is_ipv4).collect()
    }

    proptest! {
        #[test]
        fn the_families_take_turns_and_each_keeps_its_order(
            families in proptest::collection::vec(any::<bool>(), 0..200),
        ) {
            let found = addrs(&families);
            let turns = turns(&found);
            prop_assert_eq!(turns.len(), found.len().min(config::DIAL_ADDRESSES_MAX));
            prop_assert_eq!(turns.first(), found.first());
            for is_ipv4 in [false, true] {
                let (before, after) = (of_family(&found, is_ipv4), of_family(&turns, is_ipv4));
                prop_assert_eq!(&after[..], &before[..after.len()]);
            }
            for (index, pair) in turns.windows(2).enumerate() {
                let (family, other) = (pair[0].is_ipv4(), !pair[0].is_ipv4());
                let tried = of_family(&turns[..=index], other).len();
                let is_other_over = tried == of_family(&found, other).len();
                prop_assert!(pair[1].is_ipv4() != family || is_other_over, "{:?}", turns);
            }
        }
    }

    #[test]
    fn the_second_family_is_tried_second_whatever_the_first_has() {
        let mut found = addrs(&[false; 10_000]);
        found.push(addr(7, true));
        let turns = turns(&found);
        assert_eq!(turns.len(), config::DIAL_ADDRESSES_MAX);
        assert_eq!(turns[..3], [found[0], addr(7, true), found[1]]);
    }

    #[test]
    fn addresses_that_do_not_fit_are_left_out_and_none_is_an_error() {
        let found = addrs(&[false, true, false]);
        let local = |is_ipv4| Some(addr(0, is_ipv4));
        let in_order = |text: &str, local, found: &[SocketAddr]| {
            let address: Address = text.parse().unwrap();
            let peers = Allowed { address: &address, local }.in_order(found);
            peers.map(|peers| peers.iter().map(|peer| peer.as_inet().unwrap().port()).collect())
        };
        let ports = |text, local| -> Vec<u16> { in_order(text, local, &found).unwrap() };
        assert_eq!(ports("name:80", None), [1, 2, 3]);
        assert_eq!(ports("tcp4:name:80", None), [2]);
        assert_eq!(ports("name:80", local(false)), [1, 3]);
        let refused = |text, local, found| {
            let error = in_order(text, local, found).map(|ports: Vec<u16>| ports).unwrap_err();
            assert!(error.is_invalid(), "{error:?}");
            error.to_string()
        };
        assert_eq!(
            refused("tcp6:name:80", local(true), &found),
            "connect tcp6:name:80: no address of the family of the local address 127.0.0.1:0"
        );
        assert_eq!(
            refused("tcp4:name:80", local(true), &found[..1]),
            "connect tcp4:name:80: no address of the family asked for"
        );
    }
}
