//! Compressed clusters: raw deflate or zstd ("Compressed Clusters Descriptor").

use std::io;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::stream::raw::{InBuffer, Operation, OutBuffer};

use super::header::Compression;

/// The window that readers of deflated clusters have, as a power of two.
const WINDOW_BITS: u8 = 12;

/// How hard zstd tries; its own default.
const ZSTD_LEVEL: i32 = 3;

/// Fills `cluster` with what `data` holds. Bytes after the end of the compressed data are ignored.
///
/// # Errors
///
/// `InvalidData` when it does not hold a whole cluster.
pub(crate) fn expand(kind: Compression, data: &[u8], cluster: &mut [u8]) -> io::Result<()> {
    let filled = match kind {
        Compression::Zlib => inflate(data, cluster)?,
        Compression::Zstd => unzstd(data, cluster)?,
    };
    if filled < cluster.len() {
        return Err(broken());
    }
    Ok(())
}

fn broken() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "a compressed cluster does not expand to a whole cluster",
    )
}

fn inflate(data: &[u8], cluster: &mut [u8]) -> io::Result<usize> {
    let mut inflater = Decompress::new(false);
    let end = inflater.decompress(data, cluster, FlushDecompress::Finish);
    match end {
        Ok(Status::StreamEnd | Status::Ok | Status::BufError) => {}
        Err(_) => return Err(broken()),
    }
    Ok(usize::try_from(inflater.total_out()).unwrap_or(0))
}

fn unzstd(data: &[u8], cluster: &mut [u8]) -> io::Result<usize> {
    let mut decoder = zstd::stream::raw::Decoder::new()?;
    let mut input = InBuffer::around(data);
    let mut output = OutBuffer::around(cluster);
    loop {
        let before = (input.pos(), output.pos());
        let hint = decoder.run(&mut input, &mut output).map_err(|_| broken())?;
        // A frame is at its end, or there is no room, or nothing moves any more.
        if hint == 0 || output.pos() == output.capacity() || before == (input.pos(), output.pos()) {
            return Ok(output.pos());
        }
    }
}

/// Compresses a cluster; `None` when that makes it no smaller.
///
/// # Errors
///
/// The library's.
pub(crate) fn shrink(kind: Compression, cluster: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut out = vec![0; cluster.len()];
    let len = match kind {
        Compression::Zlib => {
            let mut deflater =
                Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS);
            match deflater.compress(cluster, &mut out, FlushCompress::Finish) {
                Ok(Status::StreamEnd) => usize::try_from(deflater.total_out()).unwrap_or(out.len()),
                Ok(Status::Ok | Status::BufError) => return Ok(None),
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        Compression::Zstd => match zstd::bulk::compress_to_buffer(cluster, &mut out, ZSTD_LEVEL) {
            Ok(len) => len,
            // It did not fit.
            Err(_) => return Ok(None),
        },
    };
    if len >= cluster.len() {
        return Ok(None);
    }
    out.truncate(len);
    Ok(Some(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_compressed_expands_to_itself_with_bytes_behind_it() {
        let cluster: Vec<u8> = (0..65536_u32)
            .map(|i| u8::try_from(i / 97 % 256).unwrap())
            .collect();
        for kind in [Compression::Zlib, Compression::Zstd] {
            let mut data = shrink(kind, &cluster).unwrap().unwrap();
            assert!(data.len() < 8192);
            data.extend_from_slice(&[0xff; 300]);
            let mut back = vec![0; cluster.len()];
            expand(kind, &data, &mut back).unwrap();
            assert_eq!(back, cluster, "{kind:?}");
        }
    }

    #[test]
    fn noise_is_not_compressed_and_garbage_is_refused() {
        let mut state = 1_u64;
        let noise: Vec<u8> = (0..65536)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        for kind in [Compression::Zlib, Compression::Zstd] {
            assert_eq!(shrink(kind, &noise).unwrap(), None);
            let mut back = vec![0; 65536];
            assert!(expand(kind, &noise[..512], &mut back).is_err());
            assert!(expand(kind, &[], &mut back).is_err());
        }
    }
}
