//! Connecting for the clients of hyper-util.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::Uri;
use hyper_util::client::legacy::connect::{Connected, Connection};
use ringpoll::Dialer;
use tower_service::Service;

use crate::TokioStream;

/// Connects for `hyper_util::client::legacy::Client`: a `tower_service::Service<Uri>` that dials
/// the host and the port of the URI.
///
/// Its connections have no TLS. A URI with another scheme than `http` is an invalid-argument error.
///
/// ```no_run
/// use http_body_util::{BodyExt, Empty};
/// use hyper::body::Bytes;
/// use hyper_util::client::legacy::Client;
/// use hyper_util::rt::TokioExecutor;
/// use ringpoll_compat::HyperConnector;
///
/// #[tokio::main]
/// async fn main() -> Result<(), Box<dyn std::error::Error>> {
///     let client = Client::builder(TokioExecutor::new())
///         .build::<_, Empty<Bytes>>(HyperConnector::default());
///     let response = client.get("http://127.0.0.1:8972/".parse()?).await?;
///     println!("{:?}", response.into_body().collect().await?.to_bytes());
///     Ok(())
/// }
/// ```
#[derive(Clone, Debug, Default)]
pub struct HyperConnector {
    dialer: Dialer,
}

impl HyperConnector {
    /// A connector that connects with `dialer`, whose settings and pollers its connections have.
    pub fn new(dialer: Dialer) -> HyperConnector {
        HyperConnector { dialer }
    }
}

impl Service<Uri> for HyperConnector {
    type Response = TokioStream;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TokioStream>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let dialer = self.dialer.clone();
        Box::pin(async move {
            let address = address_of(&uri)?;
            Ok(TokioStream::from(dialer.connect(&address).await?))
        })
    }
}

impl Connection for TokioStream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

fn address_of(uri: &Uri) -> io::Result<String> {
    let invalid =
        |what| io::Error::new(io::ErrorKind::InvalidInput, format!("connect {uri}: {what}"));
    if uri.scheme_str().is_some_and(|scheme| scheme != "http") {
        return Err(invalid("the scheme is not http"));
    }
    let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(|| invalid("no host"))?;
    Ok(format!("tcp:{host}:{}", uri.port_u16().unwrap_or(HTTP_PORT)))
}

/// The port of a URI that names none.
const HTTP_PORT: u16 = 80;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_the_host_and_the_port_of_the_uri() {
        let address = |uri: &str| address_of(&uri.parse().expect("a URI"));
        assert_eq!(address("http://a.example/b?c").expect("valid"), "tcp:a.example:80");
        assert_eq!(address("http://a.example:81").expect("valid"), "tcp:a.example:81");
        assert_eq!(address("http://[::1]:82/").expect("valid"), "tcp:[::1]:82");
        assert!(
            address("https://a.example")
                .is_err_and(|error| error.kind() == io::ErrorKind::InvalidInput)
        );
        assert!(address("/path").is_err_and(|error| error.kind() == io::ErrorKind::InvalidInput));
    }
}
