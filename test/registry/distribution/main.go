// Command registry is an image registry for tests: CNCF Distribution, as it is. It has a module of its own, so that its
// dependencies are not the product's.
package main

import (
	"os"

	"github.com/distribution/distribution/v3/registry"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/inmemory"
)

func main() {
	if registry.RootCmd.Execute() != nil {
		os.Exit(1) // which cobra has told
	}
}
