/* SPDX-License-Identifier: Apache-2.0 */
#include "copy.h"

#define PITCH_MAX 0x7fffffffu /* CU_DEVICE_ATTRIBUTE_MAX_PITCH of every GPU so far */
#define LINEAR_MIN (32u << 10) /* from here on a plain copy to a device is a copy engine's */

static int rows_out(const struct tfd_cuda *cuda, void *stream, const struct tfd_gpu_rows *rows)
{
	const struct tfd_cuda_copy_2d copy = {
		.src_type = TFD_CUDA_DEVICE,
		.src_device = rows->device,
		.src_pitch = rows->stride,
		.dst_type = TFD_CUDA_HOST,
		.dst_host = rows->host,
		.dst_pitch = rows->bytes,
		.width = rows->bytes,
		.height = rows->rows,
	};

	return cuda->copy_2d(&copy, stream);
}

static int rows_in(const struct tfd_cuda *cuda, void *stream, const uint8_t *host, size_t host_pitch,
                   uint64_t device, size_t device_pitch, size_t width, size_t height)
{
	const struct tfd_cuda_copy_2d copy = {
		.src_type = TFD_CUDA_HOST,
		.src_host = host,
		.src_pitch = host_pitch,
		.dst_type = TFD_CUDA_DEVICE,
		.dst_device = device,
		.dst_pitch = device_pitch,
		.width = width,
		.height = height,
	};

	return cuda->copy_2d(&copy, stream);
}

/*
 * A short range to the device. A plain copy of it is written by the GPU's front end, which waits for a time slice; a copy of two rows,
 * with or without a gap between them, is a copy engine's, whatever its length (README.md). An odd length is two of them, which overlap
 * in all but a byte. A single byte is no two rows: it would hold up the stream, which is everybody's, so that it is refused (the core
 * refuses a job that would need it, tfd_open_takes).
 */
static int short_in(const struct tfd_cuda *cuda, void *stream, const uint8_t *host, uint64_t device,
                    size_t bytes)
{
	size_t width = bytes / 2;
	int result;

	if (!width)
		return TFD_CUDA_INVALID_VALUE;
	result = rows_in(cuda, stream, host, width, device, width, width, 2);
	return result || bytes % 2 == 0 ? result :
	                                  rows_in(cuda, stream, host + 1, width, device + 1, width, width, 2);
}

static int range_in(const struct tfd_cuda *cuda, void *stream, const uint8_t *host, uint64_t device,
                    size_t bytes)
{
	return bytes < LINEAR_MIN ? short_in(cuda, stream, host, device, bytes) :
	                            cuda->copy_in(device, host, bytes, stream);
}

int tfd_gpu_copy_out(const struct tfd_cuda *cuda, void *stream, const struct tfd_gpu_rows *rows)
{
	int result = 0;

	if (rows->rows > 1 && rows->stride <= PITCH_MAX)
		return rows_out(cuda, stream, rows);
	for (uint32_t i = 0; !result && i < rows->rows; i++)
		result = cuda->copy_out(rows->host + (uint64_t)i * rows->bytes,
		                        rows->device + i * rows->stride, rows->bytes, stream);
	return result;
}

int tfd_gpu_copy_in(const struct tfd_cuda *cuda, void *stream, const struct tfd_gpu_rows *rows)
{
	int result = 0;

	if (rows->rows > 1 && rows->stride > rows->bytes && rows->stride <= PITCH_MAX)
		return rows_in(cuda, stream, rows->host, rows->bytes, rows->device, rows->stride, rows->bytes,
		               rows->rows);
	if (rows->rows > 1 && rows->stride == rows->bytes)
		return range_in(cuda, stream, rows->host, rows->device, (size_t)rows->bytes * rows->rows);
	for (uint32_t i = 0; !result && i < rows->rows; i++)
		result = range_in(cuda, stream, rows->host + (uint64_t)i * rows->bytes,
		                  rows->device + i * rows->stride, rows->bytes);
	return result;
}
