/* SPDX-License-Identifier: Apache-2.0 */
/* Names and sentences of the tables in abi.h; in both modules. */
#include "transferd/names.h"

#include "abi_check.h"

struct name_row {
	const char *name;
	const char *text;
};

#define NAME_ROW(number, name, sentence) [number] = { #name, sentence },
static const struct name_row job_status_rows[TFD_JOB_STATUS_COUNT] = { TFD_JOB_STATUS_TABLE(NAME_ROW) };
static const struct name_row detail_rows[TFD_DETAIL_COUNT] = { TFD_DETAIL_TABLE(NAME_ROW) };
#undef NAME_ROW

static const struct name_row unknown_row = { "UNKNOWN", "unknown to this version of transferd" };

static const struct name_row *job_status_row(uint32_t status)
{
	return status < TFD_JOB_STATUS_COUNT ? &job_status_rows[status] : &unknown_row;
}

static const struct name_row *detail_row(uint32_t detail)
{
	return detail < TFD_DETAIL_COUNT ? &detail_rows[detail] : &unknown_row;
}

const char *tfd_job_status_name(uint32_t status)
{
	return job_status_row(status)->name;
}

const char *tfd_job_status_text(uint32_t status)
{
	return job_status_row(status)->text;
}

const char *tfd_detail_name(uint32_t detail)
{
	return detail_row(detail)->name;
}

const char *tfd_detail_text(uint32_t detail)
{
	return detail_row(detail)->text;
}
