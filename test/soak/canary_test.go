package main

import (
	"encoding/base64"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTheCanaryIsFoundInEveryForm(t *testing.T) {
	encode := func(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) }
	password := canary + "source-1-7"
	auth := encode(userName + ":" + password)
	for name, text := range map[string]string{
		"as it is":                    password,
		"inside of a line":            "error=" + password + ", again",
		"base64":                      encode(password),
		"base64 of user and password": auth,
	} {
		t.Run(name, func(t *testing.T) {
			require.Error(t, findCanary("here", text))
			for shift := range 3 { // as in a Secret's data, wherever it begins there
				require.Error(t, findCanary("here", encode(strings.Repeat("x", shift)+`{"auths":`+text+`}`)))
			}
		})
	}
	require.NoError(t, findCanary("here", "level=INFO msg=starting "+encode("no credential at all, and a long one")))
	require.NotContains(t, findCanary("here", password).Error(), canary)
}
