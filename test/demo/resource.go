package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
)

// longestCell is how much of a cell fits into the line.
const longestCell = 33

// resources is the path of the ImagePullSecrets at the API server.
func resources() string {
	return "/apis/" + v1alpha1.GroupVersion.String() + "/" + v1alpha1.Resource.Resource
}

func (d *demo) rest() rest.Interface { return d.client.Discovery().RESTClient() }

func (d *demo) readStatus(ctx context.Context) (v1alpha1.ImagePullSecretStatus, error) {
	r := &v1alpha1.ImagePullSecret{}
	raw, err := d.rest().Get().AbsPath(resources(), resourceName).Do(ctx).Raw()
	if err == nil {
		err = json.Unmarshal(raw, r)
	}
	if err != nil {
		return r.Status, fmt.Errorf("read the ImagePullSecret: %w", err)
	}
	return r.Status, nil
}

// awaitStatus waits until the resource says so, and that so many namespaces have the Secret.
func (d *demo) awaitStatus(ctx context.Context, status string, delivered int) error {
	return eventually(ctx, fmt.Sprintf("the resource says %s with %d namespaces", status, delivered), func(ctx context.Context) error {
		s, err := d.readStatus(ctx)
		if err == nil && (s.Status != status || s.Namespaces == nil || s.Namespaces.Delivered != int64(delivered)) {
			err = fmt.Errorf("%q, %s, namespaces %v", s.Status, s.Reason, s.Namespaces)
		}
		return err
	})
}

// status shows the resource once all is delivered.
func (d *demo) status(ctx context.Context) error {
	if err := d.awaitStatus(ctx, v1alpha1.StatusReady, len(d.served)); err != nil {
		return err
	}
	d.done(fmt.Sprintf("the resource says Ready, with %d namespaces", len(d.served)))
	return d.show(ctx)
}

// showColumns prints what kubectl would: it asks for the same table.
func (d *demo) showColumns(ctx context.Context) error {
	table := &metav1.Table{}
	raw, err := d.rest().Get().AbsPath(resources()).SetHeader("Accept", "application/json;as=Table;g=meta.k8s.io;v=v1").Do(ctx).Raw()
	if err == nil {
		err = json.Unmarshal(raw, table)
	}
	if err != nil {
		return fmt.Errorf("ask for the table of ImagePullSecrets: %w", err)
	}
	d.note("$ kubectl get imps")
	w := tabwriter.NewWriter(d.out, 0, 0, 2, ' ', 0)
	line := "   "
	for _, column := range table.ColumnDefinitions {
		line += strings.ToUpper(column.Name) + "\t"
	}
	for _, row := range table.Rows {
		line = strings.TrimSuffix(line, "\t") + "\n   "
		for _, value := range row.Cells {
			cell := ""
			if value != nil {
				cell = fmt.Sprint(value)
			}
			if len(cell) > longestCell {
				cell = cell[:longestCell-3] + "..."
			}
			line += cell + "\t"
		}
	}
	_, _ = fmt.Fprintln(w, strings.TrimSuffix(line, "\t")) // see say
	_ = w.Flush()
	return nil
}

// get shows the resource of a demo that was kept, where KUBECONFIG says, and returns the exit code.
func (d *demo) get(ctx context.Context) int {
	config, err := clientcmd.BuildConfigFromFlags("", os.Getenv(clientcmd.RecommendedConfigPathEnvVar))
	if err == nil {
		d.client, err = kubernetes.NewForConfig(config)
	}
	if err == nil {
		err = d.show(ctx)
	}
	if err != nil {
		d.say("%v", err)
		return 1
	}
	return 0
}

// show prints what people see of the resource.
func (d *demo) show(ctx context.Context) error {
	if err := d.showColumns(ctx); err != nil {
		return err
	}
	status, err := d.readStatus(ctx)
	d.say("")
	for _, condition := range status.Conditions {
		d.showCondition(condition)
	}
	return err
}

func (d *demo) showCondition(c metav1.Condition) {
	d.paragraph(fmt.Sprintf("   %-13s %-7s ", c.Type, c.Status), c.Message)
}
