//! hickory's resolver for the names of a [`Dialer`](ringpoll::Dialer).
//!
//! The code runs on the thread that polls the dial. hickory spawns tasks of its own on a tokio
//! runtime.

use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};

use hickory_resolver::TokioResolver;
use hickory_resolver::net::NetError;
use ringpoll::Resolve;
use tokio::runtime::Handle;

/// Looks up names with [`hickory_resolver`], without a thread for each name. Its cache is shared by
/// all clones.
///
/// **A dial by name needs the context of a tokio runtime** whose I/O and time are enabled: a task
/// of the runtime, or a handler of a server that was given the runtime. hickory spawns tasks there.
/// Outside of a runtime the look-up fails with [`io::ErrorKind::Unsupported`].
///
/// # Examples
/// ```no_run
/// use ringpoll::Dialer;
/// use ringpoll_compat::HickoryResolver;
///
/// # async fn run() -> ringpoll::Result<()> {
/// let dialer = Dialer::new().resolver(HickoryResolver::from_system()?);
/// let conn = dialer.connect("example.com:80").await?;
/// # drop(conn);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct HickoryResolver {
    resolver: TokioResolver,
}

impl HickoryResolver {
    /// With the name servers of the system: reads `/etc/resolv.conf` and `/etc/hosts`, and does not
    /// follow their changes.
    ///
    /// # Errors
    /// A file that cannot be read or parsed.
    pub fn from_system() -> io::Result<HickoryResolver> {
        let resolver = TokioResolver::builder_tokio().and_then(|builder| builder.build());
        resolver.map(HickoryResolver::from).map_err(to_io)
    }
}

impl From<TokioResolver> for HickoryResolver {
    fn from(resolver: TokioResolver) -> HickoryResolver {
        HickoryResolver { resolver }
    }
}

impl Resolve for HickoryResolver {
    fn resolve(
        &self,
        host: &str,
        port: u16,
    ) -> Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>> {
        let (resolver, host) = (self.resolver.clone(), host.to_owned());
        Box::pin(async move {
            let runtime = Handle::try_current().map_err(|_| {
                let why = "hickory needs the context of a tokio runtime";
                io::Error::new(io::ErrorKind::Unsupported, why)
            })?;
            let mut look_up = pin!(resolver.lookup_ip(host));
            // A later poll may come from a thread outside of the runtime, and hickory spawns tasks
            // then as well.
            let found = poll_fn(|cx| {
                let _context = runtime.enter();
                look_up.as_mut().poll(cx)
            });
            let found = found.await.map_err(to_io)?;
            Ok(found.iter().map(|ip| SocketAddr::new(ip, port)).collect())
        })
    }
}

/// A name without addresses is [not found](io::ErrorKind::NotFound).
fn to_io(error: NetError) -> io::Error {
    match error.is_no_records_found() {
        true => io::Error::new(io::ErrorKind::NotFound, error),
        false => io::Error::other(error),
    }
}
