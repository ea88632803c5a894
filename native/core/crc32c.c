/* SPDX-License-Identifier: Apache-2.0 */
/*
 * CRC-32C (Castagnoli): polynomial 0x1EDC6F41, reflected 0x82F63B78, initial and final value inverted (RFC 3720, 12.1). By the
 * processor where it can, else eight bytes at a time by tables (Kounavis and Berry, "A Systematic Approach to Building High
 * Performance Software-based CRC Generators").
 */
#include <pthread.h>
#include <stddef.h>
#include <string.h>

#include "parts.h"

#define REFLECTED 0x82f63b78u

static uint32_t tables[8][256];
static uint32_t (*step)(uint32_t crc, const uint8_t *bytes, size_t count);
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void tables_make(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t crc = i;

		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? REFLECTED : 0);
		tables[0][i] = crc;
	}
	for (uint32_t i = 0; i < 256; i++) {
		for (int k = 1; k < 8; k++)
			tables[k][i] = tables[k - 1][i] >> 8 ^ tables[0][tables[k - 1][i] & 0xff];
	}
}

static uint32_t step_by_tables(uint32_t crc, const uint8_t *bytes, size_t count)
{
	for (; count >= 8; bytes += 8, count -= 8) {
		uint64_t word;

		memcpy(&word, bytes, sizeof(word)); /* little-endian, as are all hosts that we run on */
		word ^= crc;
		crc = 0;
		for (int k = 0; k < 8; k++)
			crc ^= tables[7 - k][word >> 8 * k & 0xff];
	}
	while (count--)
		crc = crc >> 8 ^ tables[0][(crc ^ *bytes++) & 0xff];
	return crc;
}

#ifdef __x86_64__
__attribute__((target("sse4.2"))) static uint32_t step_by_processor(uint32_t crc, const uint8_t *bytes,
                                                                    size_t count)
{
	uint64_t wide = crc;

	for (; count >= 8; bytes += 8, count -= 8) {
		uint64_t word;

		memcpy(&word, bytes, sizeof(word));
		wide = __builtin_ia32_crc32di(wide, word);
	}
	crc = (uint32_t)wide;
	while (count--)
		crc = __builtin_ia32_crc32qi(crc, *bytes++);
	return crc;
}
#endif

static void choose(void)
{
	tables_make();
	step = step_by_tables;
#ifdef __x86_64__
	if (__builtin_cpu_supports("sse4.2"))
		step = step_by_processor;
#endif
}

void tfd_crc32c_init(void)
{
	(void)pthread_once(&once, choose);
}

uint32_t tfd_crc32c(uint32_t crc, const void *bytes, size_t count)
{
	return ~step(~crc, bytes, count);
}

uint32_t tfd_crc32c_by_tables(uint32_t crc, const void *bytes, size_t count)
{
	return ~step_by_tables(~crc, bytes, count);
}
