/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Names and sentences of the tables in abi.h. Any thread may call them; the strings are static. A number
 * outside the table is "UNKNOWN", so that what an untrusted or newer party wrote can be printed.
 */
#ifndef TRANSFERD_NAMES_H
#define TRANSFERD_NAMES_H

#include <stdint.h>

#include "transferd/abi.h"

const char *tfd_job_status_name(uint32_t status);
const char *tfd_job_status_text(uint32_t status);
const char *tfd_detail_name(uint32_t detail);
const char *tfd_detail_text(uint32_t detail);

#endif
