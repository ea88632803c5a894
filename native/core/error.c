/* SPDX-License-Identifier: Apache-2.0 */
#include <stdarg.h>
#include <stdio.h>

#include "parts.h"

int tfd_fail(struct tfd_error *error, int rc, const char *format, ...)
{
	va_list arguments;

	if (error) {
		va_start(arguments, format);
		(void)vsnprintf(error->text, sizeof(error->text), format, arguments);
		va_end(arguments);
	}
	return rc;
}
