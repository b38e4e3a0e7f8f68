"""Videos as phones make them: turned by a flag, of uneven frame times, with sound, and as long as one wishes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import pytest

from tests import clips

TICKS = Fraction(1, 90_000)
SOUND = 44_100
BLOCK = 1024  # samples of a packet of AAC
UNEVEN = (Fraction(5, 4), Fraction(7, 8), Fraction(7, 8))  # lengths of three frames, of what they should be
HLG = "libx265 hlg"  # HEVC Main 10 in BT.2020 with HLG, as phones film where HDR is not switched off
_QUIET = "log-level=none"
_OPTIONS = {
    "libx264": {"preset": "ultrafast", "crf": "23", "bf": "2"},
    "libx265": {"preset": "ultrafast", "crf": "23", "x265-params": _QUIET},
    HLG: {
        "preset": "ultrafast",
        "crf": "23",
        "x265-params": f"{_QUIET}:colorprim=bt2020:transfer=arib-std-b67:colormatrix=bt2020nc:range=limited",
    },
}
CODECS = tuple(_OPTIONS)


@dataclass
class _Packet:
    time: Fraction
    stream: int
    data: bytes
    pts: int
    dts: int
    duration: int
    key: bool


def skip_without(codec):
    """Skips the test where PyAV has no encoder for the videos of that name."""
    name = codec.split()[0]
    if name not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {name}")


def frame_times(count, rate):
    """When each frame is shown, in units of TICKS."""
    lengths = [round(UNEVEN[i % 3] / rate / TICKS) for i in range(count)]
    return [sum(lengths[:i]) for i in range(count)]


def write_phone_video(
    path, frames, *, rate=24, codec="libx264", degrees=90, keyframe_every=24, times=1, threads=0
):
    """An MP4 of (H, W, 3) frames as they are to be seen; it stores them turned, and a flag turns them back.

    codec: one of CODECS. times: how often the same packets are written behind each other. Returns the number of frames.
    """
    turned = (np.rot90(frame, degrees // 90) for frame in frames)
    part = path.with_name(f"{path.stem}-part.mp4")
    count = _encode(part, turned, rate, codec, keyframe_every, threads)
    if times == 1:
        part.replace(path)
    else:
        _repeat(part, path, times, count / Fraction(rate))
        part.unlink()
    if degrees:
        clips.rotate_file(path, degrees)
    return count * times


def _encode(path, frames, rate, codec, keyframe_every, threads):
    count = 0
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec.split()[0], rate=rate, options=dict(_OPTIONS[codec]))
        video.pix_fmt = "yuv420p10le" if codec == HLG else "yuv420p"
        video.codec_context.time_base = TICKS
        video.codec_context.gop_size = keyframe_every
        video.codec_context.thread_count = threads
        sound = container.add_stream("aac", rate=SOUND)
        sound.layout = "mono"
        spoken = 0
        for index, frame in enumerate(frames):
            if not index:
                video.height, video.width = frame.shape[:2]
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if codec == HLG:
                picture = picture.reformat(format=video.pix_fmt, dst_colorspace="BT2020")
            picture.pts, picture.time_base = frame_times(index + 1, rate)[-1], TICKS
            container.mux(video.encode(picture))
            count += 1
            while (spoken + BLOCK) / SOUND <= count / rate:
                container.mux(sound.encode(_tone(spoken)))
                spoken += BLOCK
        for stream in (video, sound):
            container.mux(stream.encode())
    return count


def _tone(first):
    wave = np.sin(2 * np.pi * 440 * (first + np.arange(BLOCK)) / SOUND).astype(np.float32)
    block = av.AudioFrame.from_ndarray(wave[None] * 0.2, format="fltp", layout="mono")
    block.sample_rate, block.pts, block.time_base = SOUND, first, Fraction(1, SOUND)
    return block


def _repeat(part, path, times, seconds):
    with av.open(str(part)) as given, av.open(str(path), "w") as made:
        olds = [*given.streams.video, *given.streams.audio]
        news = [made.add_stream_from_template(old) for old in olds]
        lengths = [round(seconds / old.time_base) for old in olds]
        packets = []
        for packet in given.demux(*olds):
            place = olds.index(packet.stream)
            ends_late = place and packet.pts is not None and packet.pts + packet.duration > lengths[place]
            if not packet.size or ends_late:
                continue
            time = packet.dts * packet.time_base
            packets.append(
                _Packet(
                    time, place, bytes(packet), packet.pts, packet.dts, packet.duration, packet.is_keyframe
                )
            )
        packets.sort(key=lambda packet: packet.time)
        for turn in range(times):
            for one in packets:
                packet = av.Packet(one.data)
                packet.stream, packet.time_base = news[one.stream], olds[one.stream].time_base
                shift = turn * lengths[one.stream]
                packet.pts, packet.dts, packet.duration = one.pts + shift, one.dts + shift, one.duration
                packet.is_keyframe = one.key
                made.mux(packet)
