package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
)

// path is the resource's own, below the API server's address.
var path = "/apis/" + v1alpha1.GroupVersion.String() + "/" + v1alpha1.Resource.Resource

func (d *demo) images() rest.Interface { return d.client.Discovery().RESTClient() }

func (d *demo) readResource(ctx context.Context) (*v1alpha1.ImagePullSecret, error) {
	raw, err := d.images().Get().AbsPath(path, resourceName).Do(ctx).Raw()
	if err != nil {
		return nil, fmt.Errorf("read the ImagePullSecret: %w", err)
	}
	r := &v1alpha1.ImagePullSecret{}
	if err := json.Unmarshal(raw, r); err != nil {
		return nil, fmt.Errorf("parse the ImagePullSecret: %w", err)
	}
	return r, nil
}

// resourceIs returns an error unless the status says so, about so many namespaces with the Secret.
func (d *demo) resourceIs(ctx context.Context, status string, delivered int) error {
	r, err := d.readResource(ctx)
	if err != nil {
		return err
	}
	counts := v1alpha1.NamespaceCounts{}
	if r.Status.Namespaces != nil {
		counts = *r.Status.Namespaces
	}
	if r.Status.Status != status || counts.Delivered != int64(delivered) {
		return fmt.Errorf("status %q with %d of %d namespaces, not %s with %d", r.Status.Status, counts.Delivered, counts.Selected, status, delivered)
	}
	return nil
}

// status shows what people see of the resource once all is delivered.
func (d *demo) status(ctx context.Context) error {
	if err := eventually(ctx, "the resource is ready", func(ctx context.Context) error {
		return d.resourceIs(ctx, v1alpha1.StatusReady, len(d.served))
	}); err != nil {
		return err
	}
	d.ok(fmt.Sprintf("the resource says Ready, with %d namespaces", len(d.served)))
	if err := d.showColumns(ctx); err != nil {
		return err
	}
	r, err := d.readResource(ctx)
	if err != nil {
		return err
	}
	d.say("")
	for _, condition := range r.Status.Conditions {
		d.showCondition(condition)
	}
	return nil
}

// showColumns prints what kubectl would: it asks for the same table.
func (d *demo) showColumns(ctx context.Context) error {
	raw, err := d.images().Get().AbsPath(path).SetHeader("Accept", "application/json;as=Table;g=meta.k8s.io;v=v1").Do(ctx).Raw()
	if err != nil {
		return fmt.Errorf("ask for the table: %w", err)
	}
	answer := &metav1.Table{}
	if err := json.Unmarshal(raw, answer); err != nil {
		return fmt.Errorf("parse the table: %w", err)
	}
	d.say("   $ kubectl get imps")
	lines := [][]any{{}}
	for _, column := range answer.ColumnDefinitions {
		lines[0] = append(lines[0], strings.ToUpper(column.Name))
	}
	for _, row := range answer.Rows {
		for i, cell := range row.Cells {
			if cell == nil {
				row.Cells[i] = "" // as kubectl does
			}
		}
		lines = append(lines, row.Cells)
	}
	t := table{printer: d.printer, widths: make([]int, len(answer.ColumnDefinitions)-1)}
	for _, line := range lines {
		for i := range t.widths {
			t.widths[i] = max(t.widths[i], len(fmt.Sprint(line[i])))
		}
	}
	for _, line := range lines {
		t.row(line...)
	}
	return nil
}

func (d *demo) showCondition(c metav1.Condition) {
	d.paragraph(fmt.Sprintf("   %-13s %-8s ", c.Type, c.Status), c.Message)
}
