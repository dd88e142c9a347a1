package main

import (
	"encoding/base64"
	"fmt"
	"strings"
)

const (
	// canary begins every password.
	canary   = "canary-5a1e77-never-printed-"
	userName = "robot"
)

// needles are the forms that the canary takes in a text.
var needles = func() []string {
	list := append([]string{canary}, encodings(canary)...)
	for _, encoded := range list[1:] { // as auth in a docker config, in the data of a Secret
		list = append(list, encodings(encoded)...)
	}
	return list
}()

// encodings are what base64 makes of a text that stands anywhere in another, without the
// ends that depend on what is around it.
func encodings(text string) []string {
	var list []string
	for shift := range 3 {
		encoded := base64.RawStdEncoding.EncodeToString([]byte(strings.Repeat("x", shift) + text))
		list = append(list, encoded[(shift*8+5)/6:(shift+len(text))*8/6])
	}
	return list
}

// findCanary returns an error where a text holds the canary, and never the text.
func findCanary(where, text string) error {
	for _, needle := range needles {
		if strings.Contains(text, needle) {
			return fmt.Errorf("a credential stands in %s", where)
		}
	}
	return nil
}
