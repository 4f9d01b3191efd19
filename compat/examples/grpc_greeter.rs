// cargo run --release -p ringpoll-compat --example grpc_greeter -- --addr 127.0.0.1:50051
//! A gRPC service of tonic on ringpoll, or on tokio with `--runtime tokio`. It differs in one line.

mod greeter;

use std::error::Error;
use std::io::{Write, stdout};

use greeter::{Greeter, GreeterServer, Greeting, Greetings, Hello};
use tokio::net::TcpListener;
use tokio_stream::{StreamExt, iter};
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let addr = option("--addr").unwrap_or_else(|| "127.0.0.1:0".to_string());
    let routes = Routes::new(GreeterServer::new(Polite));

    match option("--runtime").as_deref() {
        None | Some("ringpoll") => {
            let server = ringpoll_compat::tonic::serve(&addr, routes).bind()?;
            println!("listening on {}", server.local_addr());
            stdout().flush()?;
            server.await?;
        }
        Some("tokio") => {
            let listener = TcpListener::bind(&addr).await?;
            println!("listening on {}", listener.local_addr()?);
            stdout().flush()?;
            // ringpoll sets this option by itself.
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            Server::builder().add_routes(routes).serve_with_incoming(incoming).await?;
        }
        Some(other) => return Err(format!("--runtime {other}: use ringpoll or tokio").into()),
    }
    Ok(())
}

struct Polite;

fn greeting(hello: Hello) -> Greeting {
    Greeting { text: format!("hello, {}", hello.name) }
}

#[tonic::async_trait]
impl Greeter for Polite {
    async fn greet(&self, request: Request<Hello>) -> Result<Response<Greeting>, Status> {
        Ok(Response::new(greeting(request.into_inner())))
    }

    async fn greet_often(&self, request: Request<Hello>) -> Result<Response<Greetings>, Status> {
        let greeting = greeting(request.into_inner());
        Ok(Response::new(Box::pin(iter(vec![Ok(greeting); 10]))))
    }

    async fn greet_all(
        &self,
        request: Request<Streaming<Hello>>,
    ) -> Result<Response<Greeting>, Status> {
        let mut hellos = request.into_inner();
        let mut names = Vec::new();
        while let Some(hello) = hellos.message().await? {
            names.push(hello.name);
        }
        Ok(Response::new(greeting(Hello { name: names.join(" and ") })))
    }

    async fn greet_each(
        &self,
        request: Request<Streaming<Hello>>,
    ) -> Result<Response<Greetings>, Status> {
        let greetings = request.into_inner().map(|hello| hello.map(greeting));
        Ok(Response::new(Box::pin(greetings)))
    }
}

/// The value behind the argument `name`.
fn option(name: &str) -> Option<String> {
    std::env::args().skip_while(|argument| argument != name).nth(1)
}
