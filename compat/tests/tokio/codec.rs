//! Frames, through tokio-util's codecs.

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use ringpoll_compat::TokioStream;
use tokio_util::codec::{Framed, FramedRead, FramedWrite, LengthDelimitedCodec};

use crate::harness::{Check, Fixture, pattern};

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, codec:
            frames_of_any_size_come_back
            frames_in_flight_both_ways_come_back_in_order
            a_frame_cut_short_by_the_end_is_an_error
        }
    };
}
pub(crate) use cases;

fn codec() -> LengthDelimitedCodec {
    LengthDelimitedCodec::new()
}

async fn echo_frames(stream: TokioStream) -> Check {
    let mut frames = Framed::new(stream, codec());
    while let Some(frame) = frames.next().await {
        frames.send(frame?.freeze()).await?;
    }
    Ok(())
}

pub(crate) async fn frames_of_any_size_come_back(t: &mut Fixture) -> Check {
    let server = t.serve(echo_frames)?;
    let mut frames = Framed::new(t.dial(&server).await?, codec());
    for size in [0, 1, 4, 1000, 4096, 4097, 65_536, 200_000, 3, 2_000_000] {
        let sent = Bytes::from(pattern(size));
        frames.send(sent.clone()).await?;
        let got = frames.next().await.expect("a frame comes back")?;
        assert!(got == sent, "not the frame of {size} bytes");
    }
    Ok(())
}

/// Sent without waiting for answers, so that both directions are full at times.
pub(crate) async fn frames_in_flight_both_ways_come_back_in_order(t: &mut Fixture) -> Check {
    const FRAMES: usize = 2000;
    let server = t.serve(echo_frames)?;
    let (reader, writer) = t.dial(&server).await?.into_split();
    let sending = tokio::spawn(async move {
        let mut frames = FramedWrite::new(writer, codec());
        for index in 0..FRAMES {
            frames.feed(frame(index)).await?;
        }
        SinkExt::<Bytes>::close(&mut frames).await
    });
    let mut frames = FramedRead::new(reader, codec());
    for index in 0..FRAMES {
        let got = frames.next().await.expect("a frame comes back")?;
        assert!(got == frame(index), "not frame {index}");
    }
    assert!(frames.next().await.is_none());
    Ok(sending.await??)
}

fn frame(index: usize) -> Bytes {
    let mut bytes = pattern(index % 5000);
    bytes.extend_from_slice(&index.to_be_bytes());
    Bytes::from(bytes)
}

pub(crate) async fn a_frame_cut_short_by_the_end_is_an_error(t: &mut Fixture) -> Check {
    let server = t.serve(async |stream| {
        let mut frames = Framed::new(stream, codec());
        assert_eq!(frames.next().await.expect("one is whole")?, b"whole"[..]);
        assert!(frames.next().await.expect("one is not").is_err());
        assert!(frames.next().await.is_none());
        Ok(())
    })?;
    let mut conn = t.connect(&server).await?;
    conn.write(b"\0\0\0\x05whole\0\0\0\x05cut")?;
    conn.shutdown_write().await?;
    assert_eq!(conn.readable().await?, 0);
    Ok(())
}
