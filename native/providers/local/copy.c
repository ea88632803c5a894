/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copying. The C library's memmove knows the processor and is the fastest for what fits its caches. A job that does not fit is
 * streamed: its stores go past the caches, so that what is there stays, and no line is read only to be written over.
 */
#include "copy.h"

#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../../core/barrier.h"

#define STREAM_BYTES 128u    /* of a round: two lines */
#define STREAM_AHEAD 1024u   /* bytes */
#define STREAM_LEAST 4096u   /* below, what ends and begins a range costs more than it saves */
#define STREAM_ALIGNED 32u

static void (*stream)(uint8_t *to, const uint8_t *from, uint64_t length);
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void stream_as_usual(uint8_t *to, const uint8_t *from, uint64_t length)
{
	memmove(to, from, length);
}

#ifdef __x86_64__
__attribute__((target("avx"))) static void stream_by_avx(uint8_t *to, const uint8_t *from, uint64_t length)
{
	uint64_t first = -(uintptr_t)to % STREAM_ALIGNED;

	memcpy(to, from, first);
	to += first;
	from += first;
	for (length -= first; length >= STREAM_BYTES; length -= STREAM_BYTES) {
		__m256i a, b, c, d;

		_mm_prefetch(from + STREAM_AHEAD, _MM_HINT_NTA); /* past the end it does nothing */
		_mm_prefetch(from + STREAM_AHEAD + STREAM_BYTES / 2, _MM_HINT_NTA);
		a = _mm256_loadu_si256((const __m256i_u *)from);
		b = _mm256_loadu_si256((const __m256i_u *)(from + 32));
		c = _mm256_loadu_si256((const __m256i_u *)(from + 64));
		d = _mm256_loadu_si256((const __m256i_u *)(from + 96));
		_mm256_stream_si256((__m256i *)(void *)to, a);
		_mm256_stream_si256((__m256i *)(void *)(to + 32), b);
		_mm256_stream_si256((__m256i *)(void *)(to + 64), c);
		_mm256_stream_si256((__m256i *)(void *)(to + 96), d);
		to += STREAM_BYTES;
		from += STREAM_BYTES;
	}
	memcpy(to, from, length);
	_mm_sfence(); /* such stores are not ordered before those that tell of them */
}
#endif

static void choose(void)
{
	stream = stream_as_usual;
#ifdef __x86_64__
	if (__builtin_cpu_supports("avx"))
		stream = stream_by_avx;
#endif
}

void tfd_local_copy_init(void)
{
	(void)pthread_once(&once, choose);
}

static bool apart(const uint8_t *to, const uint8_t *from, uint64_t length)
{
	return (uintptr_t)to >= (uintptr_t)from + length || (uintptr_t)from >= (uintptr_t)to + length;
}

void tfd_local_stream(uint8_t *to, const uint8_t *from, uint64_t length)
{
	if (length >= STREAM_LEAST && apart(to, from, length))
		stream(to, from, length);
	else
		memmove(to, from, length); /* both ranges may be one client's, and overlap */
}

/* Of its own for tests/tsan.supp. */
static __attribute__((noinline)) void tfd_local_move(const struct tfd_local_part *part, bool streams)
{
	if (streams)
		tfd_local_stream(part->to, part->from, part->length);
	else
		memmove(part->to, part->from, part->length);
}

enum tfd_local_state tfd_local_copy_run(const struct tfd_local_copy *copy)
{
	for (uint32_t i = 0; i < copy->count; i++) {
		const struct tfd_local_part *part = &copy->parts[i];

		tfd_local_move(part, copy->streams);
	}
	/* The guard stores it before it puts other pages there, on whatever thread. */
	return copy->broken && tfd_load_seq(copy->broken) ? TFD_LOCAL_GONE : TFD_LOCAL_COPIED;
}
